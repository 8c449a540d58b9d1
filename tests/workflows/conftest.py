import pytest

from sparse_rt import assets


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The path of a short calibration text."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(assets.calibration_text().read_text()[:4000])
    return str(path)
