"""report.html"""

from pathlib import Path

from foveate.lab.results import Results


def write(results: Results, out: Path) -> Path:
    (out / "report.html").write_text("")
    return out
