"""Figures are scikit-learn's: the values here are those of scikit-learn 1.9.1 on these rows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlora_trainer.tasks.class_metrics import (
    class_report,
    confusion_matrix,
    counts_of_matrix,
    counts_of_sets,
    matthews,
    pearson,
    spearman,
)
from qlora_trainer.tasks.confusion import draw_confusion

# Class 3 never occurs and is predicted: its recall has nothing below the line.
TRUTH = "220212212011210000020220111202220121222022211200120210222210"
FOUND = "132312213310210020000333101331230220323031302030220313213310"
SETS = (
    "010 100 000 111 111 100 110 000 101 010 000 101 100 010 000 000 010 010 001 011 110 101 110 "
    "000 100 101 111 011 111 000 010 010 101 001 000 101 001 111 110 011"
)
FOUND_SETS = (
    "110 000 100 011 110 000 111 100 101 110 001 101 110 000 101 001 010 000 100 111 110 101 100 "
    "100 111 111 111 111 110 100 110 010 101 000 000 010 001 111 100 001"
)


def matrix() -> "np.ndarray":
    truth, found = (np.array([int(c) for c in text]) for text in (TRUTH, FOUND))
    return confusion_matrix(truth, found, 4)


def sets(text: str) -> "np.ndarray":
    return np.array([[c == "1" for c in row] for row in text.split()])


def test_one_label_a_row_scores_as_in_scikit_learn() -> None:
    assert counts_of_matrix(matrix()).averages() == pytest.approx(
        {
            "macro_precision": 0.4767628205128205,
            "macro_recall": 0.3518207282913165,
            "macro_f1": 0.3972242752730557,
            "micro_f1": 0.43333333333333335,
            "weighted_f1": 0.5019791410035312,
        },
        abs=1e-12,
    )
    assert matthews(matrix()) == pytest.approx(0.3000990669998072, abs=1e-12)


def test_several_labels_a_row_score_as_in_scikit_learn() -> None:
    assert counts_of_sets(sets(SETS), sets(FOUND_SETS)).averages() == pytest.approx(
        {
            "macro_precision": 0.6868610692140105,
            "macro_recall": 0.7440660474716202,
            "macro_f1": 0.7097685921215334,
            "micro_f1": 0.7068965517241379,
            "weighted_f1": 0.7099099099099099,
        },
        abs=1e-12,
    )


def test_correlations_are_scipys_and_ties_share_a_rank() -> None:
    x, y = np.array([1, 2, 2, 3.5, 5, 8]), np.array([2, 1, 4, 4, 9, 7.0])
    assert pearson(x, y) == pytest.approx(0.7782088059345253, abs=1e-12)
    assert spearman(x, y) == pytest.approx(0.8088235294117647, abs=1e-12)
    assert pearson(np.ones(3), np.arange(3.0)) == 0.0


def test_report_has_a_line_for_every_class() -> None:
    report = class_report(["good", "bad", "so-so", "none"], counts_of_matrix(matrix()))
    assert all(name in report for name in ("good", "bad", "so-so", "none", "macro average"))


@pytest.mark.filterwarnings("error")
def test_labels_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    picture = tmp_path / "confusion.png"
    draw_confusion(matrix(), [r"$\frac{$", "$a_b$", "c", "_d^"], picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_long_labels_stand_whole_in_the_picture(tmp_path: Path) -> None:
    names = ["comp.sys.ibm.pc.hardware", "ankle boot", "c", "d"]
    draw_confusion(matrix(), names, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    border = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all(edge.min() == 255 for edge in border), "something is cut off"
