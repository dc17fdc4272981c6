"""The evidence pipeline: what ASHEM is compared with at equal cost, over seeds and regimes, and the page about it."""
