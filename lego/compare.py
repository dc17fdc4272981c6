"""Two metrics files of one revision side by side; lego/evaluation/compare.py does it.

python -m lego.compare metrics/details/ashem.json metrics/details/dense.json
"""

from lego.evaluation.compare import comparison, main, rows_of

__all__ = ["comparison", "main", "rows_of"]

if __name__ == "__main__":
    raise SystemExit(main())
