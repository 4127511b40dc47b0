"""One engine and the shards it is given, in one process. Knows nothing of Ray.

spec.py       what a worker is sent before it begins
worker.py     shards -> batches -> engine -> parts, fed continuously
in_flight.py  the rows that the engine has at the moment, and how their answers come back
counters.py   what was answered so far
attempt.py    one attempt at one shard: its parts, and what of it is in the store
batch.py      a shard's rows -> batches: columns under the frozen schema, prompts tokenised, answers known already
poison.py     which row kills engines, by bisection; pure
reuse.py      answers of a finished run, looked up by batchq_key
index.py      where they lie: an index on disk
"""
