"""CVFP: a language model whose context vectors settle to fixed points (docs/cvfp.md); a sibling of ASHEM.

It stands on lego's ground floor and imports nothing of ASHEM.
"""
