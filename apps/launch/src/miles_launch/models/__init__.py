"""Model directories that need no hub: one made on the spot, one converted from a released package.

A recipe names them under `[model] source`; each makes the directory once and leaves a finished one alone.
"""
