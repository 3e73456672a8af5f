"""The table of a mixture's parts."""

from pathlib import Path

from slm.report.arms import Arm, Run
from slm.report.mixtures import mixture_rows

HEADER = "part,share_asked,share_read,tokens_read,unique_tokens,tokens_there,epochs,kept_frac\n"


def make_run(folder: Path, table: str) -> Run:
    folder.mkdir()
    if table:
        (folder / "mixture.csv").write_text(HEADER + table)
    return Run(folder, {}, {}, {})


def test_a_row_an_arm_and_part_is_the_mean_of_its_seeds(tmp_path):
    one = make_run(
        tmp_path / "0", "web,0.7,0.75,96,64,64,1.5,0.6\nmath,0.3,0.25,32,32,64,0.5,0.5\n"
    )
    other = make_run(
        tmp_path / "1", "web,0.7,0.65,80,64,64,1.25,0.4\nmath,0.3,0.35,48,48,64,0.75,\n"
    )
    plain = make_run(tmp_path / "2", "")
    arms = [Arm("excess", "excess", [one, other]), Arm("one corpus", "all", [plain])]
    web, math = mixture_rows(arms)
    assert web == {
        "arm": "excess",
        "part": "web",
        "share_asked": 0.7,
        "share_read": 0.7,
        "tokens_read": 88,
        "unique_tokens": 64,
        "tokens_there": 64,
        "epochs": 1.375,
        "kept_frac": 0.5,
    }
    assert math["part"] == "math" and math["epochs"] == 0.625
    assert math["kept_frac"] == 0.5  # of the seed that logged it
