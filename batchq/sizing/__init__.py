"""What a job takes before it runs: memory, replicas, settings, time and money. Arithmetic only; no torch, no ray."""
