"""The tokenizer itself: where it comes from, whether it fits the model, where responses stop."""

import copy
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tether.data.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from tether.errors import ConfigError, ModelError


def config(eos):
    return SimpleNamespace(eos_token_id=eos)


def test_a_tokenizer_comes_back_from_its_directory(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer.get_vocab()


def test_a_missing_directory_names_its_neighbor(tmp_path):
    (tmp_path / "stories").mkdir()
    with pytest.raises(ModelError, match=r"does not exist.* Did you mean 'stories'"):
        load_tokenizer(str(tmp_path / "storys"))


def test_a_path_that_breaks_off_early_says_where(tmp_path):
    with pytest.raises(ModelError, match=f"The path breaks off after {tmp_path}"):
        load_tokenizer(str(tmp_path / "a" / "b" / "c"))


def test_a_directory_without_a_tokenizer_says_what_it_needs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"its tokenizer cannot be loaded .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file_is_no_traceback(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_file_in_place_of_a_directory_is_told_apart(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is a file, where a model is a directory"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


class Hub(SimpleHTTPRequestHandler):
    """A hub on loopback that has one model, me/tiny, in a directory here."""

    def translate_path(self, path):
        return super().translate_path(re.sub("^/me/tiny/resolve/[^/]*", "", path))

    def end_headers(self):
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{abs(hash(self.path))}"')
        if "/me/tiny/" not in f"{self.path}/":
            self.send_header("X-Error-Code", "RepoNotFound")
        super().end_headers()

    def do_GET(self):
        if self.path.startswith("/api/models/me/tiny"):
            self.send_response(200)
            self.end_headers()
            answer = "[]" if "/tree/" in self.path else f'{{"id": "me/tiny", "sha": "{"a" * 40}", "siblings": []}}'
            self.wfile.write(answer.encode())
        elif self.path.startswith("/me/tiny/"):
            super().do_GET()
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


def load_from_hub(name, endpoint, cache):
    """(what loading says on stderr, seconds) in a process of its own: the hub's client reads its settings once."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    code = f"from tether.data.tokenizer import *; began = __import__('time').time()\ntry: load_tokenizer({name!r})\n"
    code += "finally: print(__import__('time').time() - began)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=cache.parent)
    return done.stderr, float(done.stdout)


def test_a_name_that_is_no_directory_costs_no_minute_where_the_hub_is_out_of_reach(tmp_path):
    (tmp_path / "stories260K").mkdir()
    for name in ("stories26K", "owner/stories26K"):
        told, seconds = load_from_hub(name, "http://127.0.0.1:9", tmp_path / "cache")  # nothing listens there
        assert f"{name} is not a directory here, and the hub does not answer" in told
        assert ("Did you mean 'stories260K'?" in told) == ("/" not in name)
        assert seconds < 10


def test_a_model_of_the_hub_is_loaded_from_there_and_one_that_it_lacks_is_said_so(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "model"))) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        told, _ = load_from_hub("me/tiny", endpoint, tmp_path / "cache")
        assert "Error" not in told
        told, _ = load_from_hub("me/tinny", endpoint, tmp_path / "cache")
        hub.shutdown()
    assert "me/tinny is not a directory here, and the hub has no such model that you may read" in told


def test_a_hub_id_out_of_reach_says_what_works_offline():
    with pytest.raises(ModelError, match="offline, give a directory that holds the tokenizer"):
        load_tokenizer("somebody/no-such-model")


def test_a_model_may_have_more_embeddings_than_the_tokenizer_has_tokens_but_not_fewer(tiny_tokenizer):
    check_vocabulary(tiny_tokenizer, len(tiny_tokenizer))
    check_vocabulary(tiny_tokenizer, len(tiny_tokenizer) + 64)
    with pytest.raises(ModelError, match="has id 257, but the model's 257 embeddings end at id 256"):
        check_vocabulary(tiny_tokenizer, 257)


@pytest.mark.parametrize(
    ("generation_config", "override", "want"),
    [
        (None, None, (1,)),  # the tokenizer's eos
        (config(None), None, (1,)),
        (config(5), None, (5,)),
        (config([5, 7]), None, (5, 7)),
        (config([5, 1]), None, (1, 5)),  # the tokenizer's own eos first: it is the one that training appends
        (config([5, 1]), [9], (9,)),  # a list replaces them
        (config([5, 1]), [9, 1, 9], (9, 1)),
        (config([5, 1]), [], ()),  # none at all
    ],
)
def test_stop_tokens_are_the_configs_or_the_models_or_the_tokenizers(tiny_tokenizer, generation_config, override, want):
    assert stop_token_ids(tiny_tokenizer, generation_config, override) == want


def test_a_tokenizer_without_eos_has_no_stop_tokens(tiny_tokenizer):
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    assert stop_token_ids(endless, None, None) == ()


def test_a_stop_token_that_no_text_can_have_is_refused(tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"sampling.stop_token_ids holds 258, which is not a token of the tokenizer"):
        stop_token_ids(tiny_tokenizer, None, [1, 258])
    with pytest.raises(ModelError, match="generation_config names eos_token_id 50256"):
        stop_token_ids(tiny_tokenizer, config(50256), None)
