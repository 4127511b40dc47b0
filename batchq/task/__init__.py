"""What is asked of a row, and how the answer is read.

Modules, in the order in which they build on each other:

    prompt.py   a row -> the user's message -> the model's prompt
    labels.py   which texts and token ids represent the labels
    answers.py  what an answer can be: its columns, what the engine is asked, how a completion is read and counted
    task.py     prompt and answer space, bound to one model's tokenizer
"""
