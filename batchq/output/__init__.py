"""What a run leaves behind: its parts, and the records of attempts and drivers that make a resume possible.

layout.py      where everything of an output lies
schema.py      the columns of every output object
objects.py     which objects hold the rows: the parts, or the compacted objects that took their place
compaction.py  parts -> few large objects
parts.py       answers -> one Parquet object with its receipt -> commit
receipts.py    what a committed part says of itself
marks.py       records of attempts at a shard
spills.py      answers saved before their part is whole
lease.py       which driver works on an output: numbered leases with heartbeats
duplicates.py  values of a user's id column that occur more than once
"""
