"""The command line: `tether COMMAND …`. The command that needs torch loads it; --help never does.

Exit codes: 0 done, 2 the user's mistake, 3 stopped by a signal after saving, 1 anything else. Mistakes are one message
on stderr; TETHER_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tether
from tether.config.kinds import KINDS, resolve
from tether.distributed.failures import is_agreed
from tether.distributed.world import refuse, restarted, world
from tether.errors import ConfigError, DataError, Interrupted, RunError, TetherError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except TetherError as error:
        if os.environ.get("TETHER_DEBUG"):
            traceback.print_exc()
        what = "" if isinstance(error, Interrupted) else "error: "  # whoever asked for the stop made no mistake
        if _speaks(error):
            print(f"tether: {what}{error}", file=sys.stderr)
        if isinstance(error, Interrupted) and "TORCHELASTIC_RUN_ID" in os.environ:
            return 0  # torchrun would start it again; status.json has the true code
        return error.exit_code
    except KeyboardInterrupt:  # outside training, which has its own way to stop
        print("tether: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output, `head` say, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        print(
            f"tether: error: a path of {len(name):,} characters ({name[:40]!r}…) is too long for a file or directory "
            "to have. Is it the text itself? Write that to a file, and name the file.",
            file=sys.stderr,
        )
        return 2
    return 0


def _speaks(error: TetherError) -> bool:
    """Whether this process prints the error: of several that torchrun started, one says what all of them raise."""
    rank, _ = world()
    return rank == 0 or not (is_agreed(error) or os.environ.get("LOCAL_RANK", "0") != "0")


def _dispatch(argv: list[str]) -> None:
    name, *rest = argv or ["--help"]
    if not (name in KINDS and KINDS[name].many):
        refuse(f"tether {name}")
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"tether {tether.__version__}")
    elif name in COMMANDS:
        COMMANDS[name](rest)
    elif name in KINDS:
        _run(name, rest)
    else:
        commands = dict.fromkeys((*KINDS, *COMMANDS))
        near = difflib.get_close_matches(name, [*commands, "--help", "--version"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}."
        raise ConfigError(f"unknown command {name}: {hint}")


# ---------------------------------------------------------------- commands that take a config


def _run(name: str, argv: list[str]) -> None:
    if "-h" in argv or "--help" in argv:
        from tether.config.help import help_text

        print(help_text(name))
        return
    from tether.config.reading import parse_args, to_yaml

    config, options = parse_args(name, argv)
    if (options.print_config or options.dry_run) and world()[0] > 0:
        return  # rank 0 prints it
    if options.print_config:
        print(to_yaml(config), end="")
    elif options.dry_run:
        from tether.diagnose import dry_run

        print(dry_run(config, fresh=options.fresh))
    else:
        fresh = options.fresh and not restarted()  # else each restart would lose what the one before had done
        result = resolve(KINDS[name].run)(config, fresh=fresh)
        if not KINDS[name].trains:
            print(result)


def _doctor(argv: list[str]) -> None:
    if "-h" in argv or "--help" in argv:
        print(DOCTOR)
        return
    if len(argv) == 1 and Path(argv[0]).is_dir():
        from tether.diagnose import examine
        from tether.reports.text import visible  # an event may hold what a model wrote

        print(visible(examine(argv[0])))
        return
    from tether.config.reading import parse_args

    parser = _parser("doctor", "")
    parser.add_argument("--ranks", type=int)
    ranks, argv = parser.parse_known_args(argv)
    if ranks.ranks is not None and (ranks.ranks < 1 or not argv):
        raise ConfigError(
            f"--ranks {ranks.ranks}: it is the number of processes, 1 or more, that the config of a run is checked "
            "for: tether doctor C.yaml --ranks 8."
        )
    config = parse_args(None, argv)[0] if argv else None
    from tether.diagnose import doctor

    print(doctor(config, ranks=ranks.ranks or 1))


# ---------------------------------------------------------------- commands with a few flags of their own


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")


def _parser(command: str, description: str) -> _Parser:
    return _Parser(prog=f"tether {command}", description=description, allow_abbrev=False)


def _demo(argv: list[str]) -> None:
    parser = _parser("demo", "The whole story on a CPU, offline, in minutes.")
    parser.add_argument(
        "--to", metavar="DIR", type=Path, default=Path("runs/demo"), help="where it writes (%(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another seed is another story (%(default)s)")
    args = parser.parse_args(argv)
    from tether.demo import main as demo

    demo(args.to, seed=args.seed)


def _generate(argv: list[str]) -> None:
    parser = _parser("generate", "Sample responses from any model directory.")
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of a causal language model")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[],
        help="a prompt, said by the user where the model has a chat template; may be given again",
    )  # fmt: skip
    parser.add_argument("--raw", action="store_true", help="give --prompt to a chat model as it is, without template")
    parser.add_argument(
        "--prompts", metavar="FILE", help="JSONL or Parquet file with a column `prompt`: text as it is, or messages"
    )
    parser.add_argument("--samples", metavar="N", type=int, default=1, help="responses to each prompt (%(default)s)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=1.0, help="divides the logits, above 0 (%(default)s)"
    )
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="keep the K likeliest tokens; 0: all")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="keep the likeliest with mass P; 1: all")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="longest response (%(default)s)")
    parser.add_argument(
        "--stop-token-ids", metavar="IDS", type=_token_ids,
        help="what ends a response, e.g. '[2, 32000]'; '[]': only the length; default: every eos of the model",
    )  # fmt: skip
    parser.add_argument(
        "--strength", metavar="X", type=float,
        help="of a model's Q-learning heads (ilql), 0: none; default: as it was trained with",
    )  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same responses (%(default)s)")
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="auto (cuda, else mps, else cpu), cuda:1, …")
    parser.add_argument("--dtype", metavar="DTYPE", default="auto", help="auto, float32 or bfloat16 (%(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument(
        "--best-of",
        metavar="N",
        type=int,
        help="score N responses to each prompt of --prompts, write the best as JSONL",
    )
    parser.add_argument(
        "--reward",
        metavar="DIR|FILE.py:NAME|JUDGE.yaml",
        help="with --best-of: the reward model, function or judge that scores",
    )
    parser.add_argument(
        "--pairs", action="store_true", help="with --best-of: best against worst, for tether reward and tether dpo"
    )
    parser.add_argument("--to", metavar="FILE", help="with --best-of: where to write it (standard output)")
    args = parser.parse_args(argv)
    options = vars(args)
    model, raw, file, prompts = (options.pop(name) for name in ("model", "raw", "prompts", "prompt"))
    n, reward, as_pairs, to = (options.pop(name) for name in ("best_of", "reward", "pairs", "to"))
    if n is not None:
        given = {"--prompt": prompts, "--raw": raw, "--samples": options.pop("samples") != 1}
        if options.pop("strength") is not None:
            raise ConfigError(
                "--strength with --best-of, which samples a model as it was saved. Leave it out, or train with another "
                "qlearning.ilql.strength."
            )
        if wrong := [flag for flag, is_given in given.items() if is_given]:
            raise ConfigError(
                f"{wrong[0]} with --best-of, which draws N answers to each prompt of a file: it would be ignored. "
                "Leave it out."
            )
        if lacking := [flag for flag, value in (("--prompts FILE", file), ("--reward SOURCE", reward)) if not value]:
            raise ConfigError(f"--best-of without {lacking[0]}: there would be nothing to choose among or by. Add it.")
        _best_of(model, file, n, reward, as_pairs=as_pairs, to=to, options=options)
        return
    if reward or as_pairs or to:
        raise ConfigError(
            "--reward, --pairs and --to go with --best-of: without it nothing is chosen. Add --best-of N."
        )
    if prompts and not raw:
        from tether.data.tokenizer import load_tokenizer

        if load_tokenizer(model, trust_remote_code=args.trust_remote_code).chat_template:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
    if file:
        from tether.data.table import read_rows

        prompts = prompts + [row["prompt"] for row in read_rows(file, columns=["prompt"])]
    if not prompts:
        raise ConfigError("no prompt: there is nothing to answer. Give --prompt TEXT or --prompts FILE.")
    from tether.reports.text import visible  # what a model wrote must not act on the terminal

    generations = tether.generate(model, prompts, **options)
    for i, generation in enumerate(generations):
        if i % args.samples == 0:
            print(f"── {visible(_shown(generation.prompt))}")
        print(f"{visible(generation.completion)}\n")


def _best_of(
    model: str, prompts: str, n: int, reward: str, *, as_pairs: bool, to: str | None, options: dict[str, Any]
) -> None:
    """The best answer to each prompt, or best against worst, as JSONL; what was chosen from on stderr."""
    if n < 2:
        raise ConfigError(f"--best-of {n}: there would be nothing to choose from. Give 2 or more.")
    if to and not Path(to).absolute().parent.is_dir():
        raise RunError(
            f"--to {to}: there is no directory {Path(to).parent}, so nothing could be written. Make it first."
        )
    if to and (Path(to).is_dir() or not os.access(Path(to).absolute().parent, os.W_OK)):
        raise RunError(f"--to {to}: no file can be written there, so the answers would be lost. Name a file.")
    from tether.runs.files import write_atomically
    from tether.train.rejection_sampling import best_of_n, pairs, winners

    scored = best_of_n(model, prompts, n=n, reward=reward, **options)
    rows = pairs(scored) if as_pairs else winners(scored)
    best, mean = (sum(row[k] for row in winners(scored)) / len(scored) for k in ("score", "score_mean"))
    said = f"{len(scored)} prompts, {n} answers each: mean score {mean:.4g}, of the best {best:.4g}"
    if as_pairs and len(rows) < len(scored):
        said += f"; {len(scored) - len(rows)} prompts give no pair: all their answers score or read alike"
    print(said, file=sys.stderr)
    if not rows:
        raise DataError(
            f"no prompt of {prompts} gives a pair: there is nothing to prefer among answers that all score or read "
            "alike. Raise --best-of, --temperature or --max-new-tokens, or score them by another --reward."
        )
    # On a terminal what a model wrote must not act: there characters beyond ASCII are written as \\u escapes.
    lines = "".join(json.dumps(row, ensure_ascii=to is None) + "\n" for row in rows)
    if to is None:
        print(lines, end="")
        return
    write_atomically(Path(to), lines)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.strip().removeprefix("[").removesuffix("]").split(",") if word.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids. Write e.g. '[2, 32000]'") from None


def _shown(prompt: Any) -> str:
    """A prompt on the terminal: a text, or what is said, by whom if it is more than one message of the user's."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return "\n   ".join(f"{message['role']}: {message.get('content')}" for message in prompt)


def _label(argv: list[str]) -> None:
    parser = _parser("label", "Make the queue of answers that people compare in the studio, or look how far it is.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--from", metavar="FILE", dest="file",
        help="items from JSONL or Parquet: prompt with answers (a list), with a and b, or with chosen and rejected",
    )  # fmt: skip
    source.add_argument("--from-run", metavar="RUN", help="items from what a run answered to the same prompt")
    source.add_argument("--sample", metavar="MODEL", help="items from a model that answers the file of --prompts now")
    parser.add_argument("--cycle", metavar="N", type=int, help="with --from-run: answers of this cycle alone")
    parser.add_argument(
        "--uncertain", action="store_true",
        help="with --from-run: the pairs on which its reward models, or they and a judge in the store, are least sure; "
        "asked first",
    )  # fmt: skip
    parser.add_argument(
        "--per-prompt", metavar="K", type=int,
        help="with --from-run: answers an item; 2 make a pair, more are ranked (2)",
    )  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="with --sample: JSONL or Parquet with a column `prompt`")
    parser.add_argument("--answers", metavar="K", type=int, help="with --sample: answers an item (2)")
    parser.add_argument("--temperature", metavar="T", type=float, help="with --sample (1.0)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="with --sample (64)")
    parser.add_argument(
        "--limit",
        metavar="N",
        type=int,
        help="only the first N rows of --from or --prompts; of --from-run N items, drawn, or with --uncertain the N "
        "least certain (100)",
    )
    parser.add_argument("--to", metavar="FILE", default="preferences.db", help="the store (%(default)s)")
    parser.add_argument(
        "--gold", metavar="FILE", help="items that check people: chosen is better than rejected, or `gold` names one"
    )
    parser.add_argument(
        "--overlap", metavar="F", type=float, default=0.2, help="share of the items for two people (%(default)s)"
    )
    parser.add_argument("--guidelines", metavar="FILE", help="text or Markdown that people go by, from now on")
    parser.add_argument(
        "--annotator", metavar="NAME", action="append", default=[], help="register somebody; may be given again"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int,
        help="of the answers that are drawn; a new store keeps it for order, sides and overlap (0)",
    )  # fmt: skip
    parser.add_argument("--export", metavar="DIR", help="write preferences.jsonl, events.jsonl and items.jsonl")
    parser.add_argument("--judges", action="store_true", help="with --export: the labels of judges among the pairs too")
    parser.add_argument("--status", action="store_true", help="how far the labeling is")
    args = parser.parse_args(argv)
    _check_label(args)
    from tether.feedback.items import items_of_model, items_of_run, label, read_items

    found = None
    if args.file:
        found = read_items(args.file, args.limit)
    elif args.uncertain:
        from tether.feedback.uncertain import LIMIT, uncertain_items

        limit = LIMIT if args.limit is None else args.limit
        found = uncertain_items(args.from_run, to=args.to, cycle=args.cycle, limit=limit)
    elif args.from_run:
        found = items_of_run(
            args.from_run, cycle=args.cycle, limit=args.limit, seed=args.seed or 0, **_given(answers=args.per_prompt)
        )
    elif args.sample:
        found = items_of_model(
            args.sample, args.prompts, limit=args.limit, seed=args.seed or 0,
            **_given(answers=args.answers, temperature=args.temperature, max_new_tokens=args.max_new_tokens),
        )  # fmt: skip
    done = label(
        to=args.to, source=found, gold=args.gold, overlap=args.overlap, seed=args.seed, guidelines=args.guidelines,
        annotators=args.annotator, export=args.export, judges=args.judges, status=args.status,
    )  # fmt: skip
    print("\n".join(done))


def _check_label(args: argparse.Namespace) -> None:
    """ConfigError where flags do not go together: none is ignored."""
    if (args.sample is None) != (args.prompts is None):
        raise ConfigError("--sample MODEL and --prompts FILE go together: one answers what the other asks. Give both.")
    of_run = {"--cycle": args.cycle, "--per-prompt": args.per_prompt, "--uncertain": args.uncertain or None}
    of_model = {"--answers": args.answers, "--temperature": args.temperature, "--max-new-tokens": args.max_new_tokens}
    for flags, source, given in (
        (of_run, "--from-run RUN", args.from_run),
        (of_model, "--sample MODEL", args.sample),
    ):
        if given is None and (ignored := [name for name, value in flags.items() if value is not None]):
            raise ConfigError(
                f"{ignored[0]} goes with {source}, which is not given: it would be ignored. Add that, or leave "
                f"{ignored[0]} out."
            )
    if args.uncertain and args.per_prompt not in (None, 2):
        raise ConfigError(
            f"--uncertain chooses pairs, and --per-prompt {args.per_prompt} asks for more answers: they would not be "
            "there. Leave one of both out."
        )
    if args.limit is not None:
        if not (args.file or args.from_run or args.sample):
            raise ConfigError(
                f"--limit {args.limit} goes with --from, --from-run or --sample: nothing else is limited. Add one, or "
                "leave it out."
            )
        if args.limit < 1:
            raise ConfigError(f"--limit {args.limit}: no pair would be asked about. Give 1 or more.")


def _given(**values: Any) -> dict[str, Any]:
    """Those of a command's flags that were given: the others keep the defaults of what is called."""
    return {name: value for name, value in values.items() if value is not None}


def _report(argv: list[str]) -> None:
    parser = _parser("report", "Write one self-contained HTML file about a run.")
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", metavar="FILE", help="where to write it (report.html in the run directory)")
    args = parser.parse_args(argv)
    print(tether.report(args.run, to=args.to))


def _export(argv: list[str]) -> None:
    parser = _parser("export", "Write a plain Hugging Face directory, checked by reloading it.")
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", metavar="DIR", required=True, help="where to write it")
    parser.add_argument("--best", action="store_true", help="the best evaluated policy instead of the last one")
    args = parser.parse_args(argv)
    try:
        print(tether.export(args.run, args.to, best=args.best))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise
        raise RunError(
            f"{args.run} cannot be exported to {args.to} ({error.strerror or error}): the model would not be there. "
            "Name a directory that is writable and has room."
        ) from error


def _studio(argv: list[str]) -> None:
    parser = _parser("studio", "Pages in the browser: watch runs, look inside completions, compare, label.")
    parser.add_argument("folder", metavar="DIR", nargs="?", default="runs", help="runs are below it (%(default)s)")
    parser.add_argument("--store", metavar="FILE", default="preferences.db", help="the labels (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others need --users (%(default)s)")
    parser.add_argument("--port", metavar="N", type=int, default=8765, help="0 takes a free one (%(default)s)")
    parser.add_argument(
        "--person", metavar="NAME", action="append", help="a link for NAME too, who may label and nothing else; again"
    )
    parser.add_argument("--users", metavar="FILE", type=Path, help='who may come in: {"name": "token", …} as JSON')
    parser.add_argument("--owner", metavar="NAME", action="append", help="of --users, who may see every page")
    parser.add_argument("--name", metavar="HOST", action="append", help="a further name that browsers may call us by")
    parser.add_argument(
        "--device", default="cpu", help="of Try it: cpu, cuda, mps; cpu while a run trains (%(default)s)"
    )
    args = parser.parse_args(argv)
    from tether.studio.serve import main as serve

    serve(
        Path(args.folder), store=Path(args.store), host=args.host, port=args.port, users=args.users,
        owners=args.owner, people=args.person, names=args.name, device=args.device,
    )  # fmt: skip


def _serve(argv: list[str]) -> None:
    parser = _parser("serve", "A reward model over HTTP: POST /score, for `reward: [{url: …, key_env: …}]`.")
    parser.add_argument("model", metavar="DIR", help="directory or hub id of a reward model, as `tether reward` writes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", metavar="N", type=int, default=8766, help="0 takes a free one (%(default)s)")
    parser.add_argument(
        "--token-env", metavar="NAME", help="environment variable that holds the token; default: a new one, printed"
    )
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="auto (cuda, else mps, else cpu), cuda:1, …")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="precision (%(default)s)"
    )
    parser.add_argument("--rows", metavar="N", type=int, default=8192, help="most answers a request (%(default)s)")
    parser.add_argument("--megabytes", metavar="N", type=int, default=128, help="longest request (%(default)s)")
    parser.add_argument(
        "--waiting",
        metavar="N",
        type=int,
        default=32,
        help="most requests that wait; further ones get 503 (%(default)s)",
    )
    args = parser.parse_args(argv)
    from tether.serving.serve import serve

    serve(
        args.model, host=args.host, port=args.port, token_env=args.token_env, device=args.device, dtype=args.dtype,
        most_rows=args.rows, most_megabytes=args.megabytes, most_waiting=args.waiting,
    )  # fmt: skip


COMMANDS = {  # beside the rows of KINDS
    "demo": _demo,
    "generate": _generate,
    "label": _label,
    "report": _report,
    "serve": _serve,
    "studio": _studio,
    "export": _export,
    "doctor": _doctor,
}


def overview() -> str:
    """What `tether --help` prints."""
    trainers = (kind for kind in KINDS.values() if kind.trains)
    lines = (f"  {k.command + ' C.yaml':<18} {k.purpose[0].lower()}{k.purpose[1:].rstrip('.')}\n" for k in trainers)
    return _OVERVIEW.replace("TRAINERS\n", "".join(lines))


_OVERVIEW = """\
usage: tether COMMAND …     (tether COMMAND --help says more)

Align a language model with human preferences: people compare completions, a reward model
learns what they prefer, PPO improves the model against it, people look again.

  demo               the whole story on a CPU, offline, in minutes
TRAINERS
  generate MODEL     sample from any model directory
  evaluate C.yaml    score, KL and win rate on prompts, with intervals
  label              make a queue of answers for people to compare
  judge C.yaml       have a model compare them, under a constitution
  revise C.yaml      have a model criticize and rewrite its answers, as examples for sft
  serve DIR          a reward model over HTTP, for runs on other machines
  studio [DIR]       pages to watch runs, look inside completions, compare and label
  report RUN         one self-contained HTML file about a run
  export RUN         a plain Hugging Face directory, checked by reloading it
  doctor [C.yaml]    check the machine, or whether a config fits it
  doctor RUN         name what went wrong in a run, and the knob to turn

Exit codes: 0 done, 2 your mistake, 3 stopped by a signal after saving, 1 anything else."""

DOCTOR = """\
usage: tether doctor [C.yaml] [--ranks N] [--key VALUE …]
       tether doctor RUN

Without a config: what this machine has. With one: checks its data and models, and predicts
peak memory by part, with --ranks of each of N processes; a judge is asked about a few answers
without content, beside real ones. Keys are those of the command that the config is for.

With a run directory: how the run stands, and what went wrong in it. Each alarm says what,
the likely cause, and the knob to turn; docs/guide.md lists them. It may still be running."""


if __name__ == "__main__":
    sys.exit(main())
