"""A kind of run is one row: a fake one, added by its row alone, is known to every reader."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import tether
from tether.cli import main
from tether.config import DataConfig, Section, SFTModelConfig, TrainingConfig
from tether.config.kinds import KINDS, Kind, kind_of, resolve
from tether.config.reading import load_config, parse_args, to_yaml
from tether.diagnose import doctor, dry_run, examine
from tether.diagnose.inputs import Inputs, Start, render
from tether.runs import Run, RunDirectory
from tether.studio.index import Runs
from tether.train.sft import input_hashes

SOURCE = Path(tether.__file__).parent


@dataclass(frozen=True)
class HumSection(Section):
    """Humming."""

    tunes: int = 3
    """Tunes to hum."""


@dataclass(frozen=True)
class HumConfig(TrainingConfig):
    """Everything of a humming run."""

    data: DataConfig
    hum: HumSection = field(default_factory=HumSection)

    def microbatch(self, longest, ranks=1):
        return 1, longest, longest - 1


trained = []


def hum(config, *, fresh=False):
    trained.append((config, fresh))


def tunes(config, hashes):
    start = Start.of(config)
    tune = start.tokenizer("la la").input_ids
    return Inputs(
        [*start.facts, f"{config.hum.tunes} tunes"],
        len(tune),
        "hum them all",
        render(start.tokenizer, tune, [True] * len(tune)),
        "a tone",
    )


@pytest.fixture
def humming(monkeypatch):
    row = Kind(
        command="hum",
        title="humming",
        purpose="Teach a model to hum.",
        config=HumConfig,
        section="hum",
        run=f"{__name__}:hum",
        inputs=f"{__name__}:tunes",
        headline=(("pitch", "hum/pitch", "Hz; higher is brighter"),),
        losses=("hum/loss",),
    )
    monkeypatch.setitem(KINDS, "hum", row)
    return row


def written(path, *, bad=False):
    config = HumConfig(run=str(path), model=SFTModelConfig("m"), data=DataConfig("d"))
    with RunDirectory.open(config, command="hum") as run:
        for step in range(1, 31):
            run.append_metrics(
                {"step": step, "hum/pitch": 440.0 + step, "hum/loss": None if bad and step == 7 else 0.5}
            )
    return path


def test_a_row_is_listed_by_help_and_runs(humming, capsys):
    assert main(["--help"]) == 0
    assert "  hum C.yaml         teach a model to hum\n" in capsys.readouterr().out
    assert main(["hum", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Teach a model to hum." in printed
    assert "hum.tunes  (a whole number; default 3)" in printed
    trained.clear()
    assert main(["hum", "--run", "r", "--model.policy", "m", "--data.path", "d", "--hum.tunes", "5", "--fresh"]) == 0
    ((config, fresh),) = trained
    assert (type(config), config.hum.tunes, fresh) == (HumConfig, 5, True)


def test_a_row_has_its_config_told_from_its_section(humming, tmp_path):
    config = parse_args("hum", ["--run", "r", "--model.policy", "m", "--data.path", "d"])[0]
    assert kind_of(config).command == "hum"
    (tmp_path / "c.yaml").write_text("run: r\nmodel: {policy: m}\ndata: {path: d}\nhum: {tunes: 2}\n")
    loaded = load_config(tmp_path / "c.yaml")
    assert (type(loaded), loaded.hum.tunes) == (HumConfig, 2)
    assert "tunes: 2" in to_yaml(loaded)


def test_a_row_has_a_dry_run_and_is_checked_by_doctor(humming, tiny_model, tmp_path, capsys):
    (tmp_path / "d").touch()
    flags = ["--run", str(tmp_path / "r"), "--model.policy", str(tiny_model()), "--data.path", str(tmp_path / "d")]
    assert main(["hum", *flags, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in (
        "  hum:\n    tunes: 3",
        "stop tokens: 1",
        "3 tunes",
        "1: a tone",
        "hum them all",
        "peak",
        "fits: needs",
    ):
        assert part in told
    config, _ = parse_args("hum", flags)
    assert "hum them all" in doctor(config)
    run = RunDirectory.open(config, command="hum", inputs=input_hashes(config))
    run.append_metrics({"step": 1})
    run.__exit__(tether.Interrupted, tether.Interrupted("by SIGTERM"), None)
    dry_run(config)
    (tmp_path / "d").write_text("another tune")
    assert main(["hum", *flags, "--dry-run"]) == 2
    assert "data.path has other content" in capsys.readouterr().err
    assert main(["hum", *flags, "--dry-run", "--fresh"]) == 0


def test_a_row_is_reported(humming, tmp_path):
    page = tether.report(written(tmp_path / "run")).read_text()
    assert "Humming" in page
    assert re.search(r"pitch.*442.*469", page, re.DOTALL)  # means of the first and the last three steps
    assert "Hz; higher is brighter" in page


def test_a_row_is_diagnosed(humming, tmp_path):
    told = examine(written(tmp_path / "run"))
    assert "humming, finished, 30 steps done" in told
    assert "442 → 469" in told
    assert "nothing found" in told
    assert "not-finite (step 7)" in examine(written(tmp_path / "bad", bad=True))


def test_a_row_is_in_the_studios_list(humming, tmp_path):
    written(tmp_path / "run")
    runs = Runs(tmp_path)
    (run_id,) = runs.all()
    row = runs.row(run_id)
    assert (row.kind, row.state, row.cycles, row.score[-1]) == ("hum", "finished", 30, 470.0)
    assert Run.open(tmp_path / "run").config.hum.tunes == 3


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_a_row_names_exists(kind):
    from tether.diagnose.alarms import RULES

    assert all(
        callable(resolve(name))
        for name in (kind.run, kind.inputs, kind.hashes, *filter(None, [kind.page, kind.memory]))
    )
    assert kind.curves is None or resolve(kind.curves)
    assert set(kind.alarms) <= set(RULES)


def test_no_reader_names_a_command():
    # a comparison with a command's name, or a unit chosen by one, belongs into the row
    named = re.compile(r"""(==|!=)\s*["'](ppo|sft)["']|kind["'\]]* (==|!=) ["']reward["']|["']cycle["'] if .* else""")
    files = [p for end in ("*.py", "*.j2", "*.js") for p in SOURCE.rglob(end) if p.parts[-2:] != ("config", "kinds.py")]
    assert len(files) > 100
    assert [f"{p}: {line}" for p in files for line in p.read_text().splitlines() if named.search(line)] == []
