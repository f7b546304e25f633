"""How a model is made smaller: one file or folder per technique, each a function from a model to a
new one.
"""
