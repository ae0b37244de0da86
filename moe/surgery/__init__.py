"""Models made out of trained ones: imported, upcycled, grown, pruned, merged, quantised, stored as differences.

Whatever it is made from, a new model is a run folder whose checkpoint is of step 0 (`start.py`): `moe resume` trains it,
`moe eval`, `moe generate`, `moe export` and `moe prune` read it like any other.
"""
