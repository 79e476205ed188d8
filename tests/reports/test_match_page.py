"""The page of how well pictures match their prompts."""

import numpy as np

from diffjax.reports.match_page import write_match_page
from diffjax.reports.pictures import save_png


def test_the_page_has_all_shares_a_line_for_each_and_both_pictures(tmp_path):
    for name in ("seen", "held_out"):
        save_png(tmp_path / f"{name}.png", np.zeros((2, 8, 8, 3)))
    rows = [
        {"guidance_scale": scale, "part": part, "shares": {"colour <i>": share}}
        for part, shares in (("seen", (0.125, 0.5)), ("held out", (0.25, 0.375)))
        for scale, share in zip((1.0, 3.0), shares, strict=True)
    ]
    result = {
        "rows": rows,
        "counts": {"colour <i>, seen": 8, "colour <i>, held out": 8},
        "real": {"colour <i>, seen": 0.9, "colour <i>, held out": 0.8},
        "copied": {"seen": 0.0, "held out": 0.0},
        "how": {"run": "runs/emoji", "of": 40},
    }
    page = write_match_page(tmp_path, result).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<svg" in page
    assert "colour <i>" not in page  # escaped
    for share in ("12.5", "50.0", "25.0", "37.5", "90.0", "chance 2.5 %"):
        assert share in page
