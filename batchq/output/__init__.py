"""What a run leaves behind: its parts, and the records of attempts and drivers that make a resume possible.

layout.py    where everything of an output lies
"""
