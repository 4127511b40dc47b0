"""What is asked of a row, and how the answer is read.

Modules, in the order in which they build on each other:

    answers.py  what an answer can be: its columns, what the engine is asked, how a completion is read and counted
    task.py     prompt and answer space, bound to one model's tokenizer
"""
