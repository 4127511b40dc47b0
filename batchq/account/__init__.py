"""What was held and what it cost.

usage.py    what one replica held and did, and the record of one invocation
cost.py     what that costs
summary.py  all numbers of a report
witness.py  a process that records what a killed driver held, and ends its engines
ledger.py   the records of invocations in the store
budget.py   what may be spent
"""
