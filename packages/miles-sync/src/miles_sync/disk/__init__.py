"""Weights in a folder that trainer and engines share: for slow links, and for engines that join late.

`FolderTarget` is a target like any other: `WeightSync([FolderTarget(path)], ...)` publishes each version that it
pushes. `WeightFolder.read` gives a version back as a source, to be pushed to whatever serves it.
"""

from miles_sync.disk.folder import Published, WeightFolder
from miles_sync.disk.target import FolderTarget

__all__ = ["FolderTarget", "Published", "WeightFolder"]
