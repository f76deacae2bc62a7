"""Host memory, against one copy and one read in the same run. Prints one JSON object.

    python packages/miles-sync/benchmarks/cpu.py --layers 4 --repeats 9

Qwen3-8B's tensors, of fewer layers: out of memory that is shared already, packed into shared memory, and over gloo; in
place and staged; with and without a digest. The same as `miles-sync bench 8b --device cpu --no-digest --json`.
"""

from __future__ import annotations

import sys

from miles_sync.bench.command import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", "8b", "--device", "cpu", "--no-digest", "--json", *sys.argv[1:]]))
