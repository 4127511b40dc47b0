"""What a person reads of an output, or of many: lines for a terminal, an HTML page, CSV, JSON.

Reports are inert. Names and messages come from inputs, models and configurations of others, so no character of them
is obeyed by a terminal, a browser or a spreadsheet.
"""
