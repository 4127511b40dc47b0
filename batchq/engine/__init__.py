"""Engines: a prompt in, token ids or label log-probabilities out. The only package that imports vllm.

Modules, in the order in which they build on each other:

    protocol.py      what every engine does, and what it is asked and started with
    fake.py          the protocol without a model, with faults that a test can order
    vllm_norms.py    vLLM's norms on a CPU, by its own kernel
    vllm_process.py  vLLM's processes: their environment, how they start early, when they end
    vllm.py          the protocol on vLLM's AsyncLLM
"""
