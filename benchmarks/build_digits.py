"""Builds ``assets/digits.npz`` from scikit-learn's copy of the UCI optical digits: 1,797 scans of 8 x 8 pixels.

python benchmarks/build_digits.py --out lit_merge/data/embedded/assets/digits.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

__all__ = ["main"]


def main() -> None:
    """Write the asset."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "lit_merge/data/embedded/assets/digits.npz"
    )
    digits = load_digits()
    np.savez_compressed(
        parser.parse_args().out, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8)
    )


if __name__ == "__main__":
    main()
