"""How a model is made smaller: one file or folder per technique, each a function from a model to a
new one.

A technique imports `surgery`, `calibration`, `nn` and what lies below them, and no other technique:
what two of them need stands there. The exceptions: `recipe` and `search` combine techniques, a
student is cut out by `pruning`, and int8 smooths.
"""
