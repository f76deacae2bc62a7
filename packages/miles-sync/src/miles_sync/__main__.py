"""`python -m miles_sync`: the same as the command `miles-sync`."""

from miles_sync.bench.command import main

raise SystemExit(main())
