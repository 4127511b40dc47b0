"""What was held and what it cost: usage of one replica, records of invocations, the bill and the budget."""
