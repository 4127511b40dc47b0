"""What is asked of a row, and how the answer is read.

Modules, in the order in which they build on each other:

    sandbox.py  Jinja as prompts may use it
    prompt.py   a row -> the user's message
    frame.py    the user's message -> the model's prompt
    labels.py   which texts and token ids represent the labels
    answers.py  what an answer can be: its columns, what the engine is asked, how a completion is read and counted
    gold.py     a row's gold value -> the label that it means
    task.py     prompt and answer space, bound to one model's tokenizer
"""
