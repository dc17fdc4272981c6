"""Satipatthana: a network that settles on what it sees and says how far it trusts it (docs/satipatthana.md).

It stands on lego's ground floor and knows nothing of ASHEM.
"""
