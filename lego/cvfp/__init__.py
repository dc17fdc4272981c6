"""CVFP: a language model whose context vectors settle to fixed points (docs/cvfp.md); a sibling of ASHEM.

It stands on base, tokens, text, report and the steps of training, and imports nothing of ASHEM.
"""
