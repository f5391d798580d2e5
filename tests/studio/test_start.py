"""The studio and the reports start without torch: seconds, and hundreds of megabytes, that looking needs none of."""

import subprocess
import sys

CODE = """
import sys
from pathlib import Path

import tether.reports
import tether.reports.page
import tether.studio.serve
from tether.feedback.store import Store
from starlette.testclient import TestClient
from tether.studio.app import create_app
from tether.studio.index import Runs
from tether.studio.security import Gate
from tether.studio.shared import Studio

gate = Gate({"testserver"}, owners={"Ada"})
app = create_app(Studio(Runs(Path(sys.argv[1])), Path(sys.argv[2]), gate))
client = TestClient(app)
assert client.get("/sign-in", params={"token": gate.link("Ada")}).status_code == 200
text = client.get("/runs").text
assert ">first<" in text, text
run = text.partition('<a href="/runs/')[2][:12]
for path in (f"/runs/{run}", f"/runs/{run}/curves", f"/runs/{run}/rollouts/4", f"/runs/{run}/rollouts/4/0", "/compare",
             "/label", "/agreement", "/revisions", "/try"):
    assert client.get(path).status_code == 200, path
loaded = {"torch", "transformers", "sklearn", "scipy"} & set(sys.modules)
assert not loaded, loaded
"""


def run_in_a_new_process(code: str, *arguments) -> None:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_studio_and_reports_start_and_show_runs_without_loading_torch(trained, tmp_path):
    run_in_a_new_process(CODE, trained, tmp_path / "p.db")


def test_a_form_is_parsed_once_by_the_guard_which_needs_no_other_parser(tmp_path):
    head, _, _ = CODE.partition("text = ")
    without = "import sys\nsys.modules['multipart'] = sys.modules['python_multipart'] = None\n"
    post = """
assert client.post("/sign-in", data={"token": gate.link("Ada")}).status_code == 200
Store(Path(sys.argv[2])).add_annotator("Ada")
answer = client.post("/label/undo", data={"form_token": gate.form_token("Ada"), "key": "k"}, follow_redirects=False)
assert (answer.status_code, answer.headers["location"]) == (303, "/label?done=nothing"), answer.text
"""
    run_in_a_new_process(without + head + post, tmp_path, tmp_path / "p.db")
