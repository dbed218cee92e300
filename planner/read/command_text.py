"""A shell file with a launch command: its launcher, flags, script and arguments, each with its place.

What is understood is what launch scripts hold: assignments, `export`, line continuations, quotes,
comments, and variables that the file itself sets. Loops and substitutions are not run; a value that
needs them stays as it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from outlay.planner.read.document import Node
from outlay.profiles.errors import FileError

LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "llamafactory-cli", "axolotl")
SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch", ".cmd", ".txt")
_TOKEN = re.compile(r"""(?:\\\n|[^\s'"\\#;&|]|\\.|'[^']*'|"(?:\\.|[^"\\])*"|(?<=\S)\#)+""", re.S)
_QUOTED = re.compile(r"""\bbash\s+-l?c\s+(?:'([^']*)'|"((?:\\.|[^"\\])*)")""", re.S)
_SKIP = re.compile(r"(?:[ \t]|\\\n)*(?:#[^\n]*)?")
_ASSIGN = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_BARE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")
_PYTHON = re.compile(r"(?:.*/)?python[\d.]*$")
_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.runner": "deepspeed",
    "axolotl.cli.train": "axolotl",
}
_SWITCHES = {
    "no_python", "module", "no_local_rank", "force_multi", "enable_each_rank_log", "bind_cores_to_rank",
    "multi_gpu", "use_deepspeed", "use_fsdp", "standalone", "no_ssh", "no_ssh_check", "cpu", "m", "quiet",
}  # fmt: skip
"""Launcher flags that take no value: the word behind them is the script."""


@dataclass(frozen=True, kw_only=True)
class _Token:
    text: str
    start: int
    end: int
    line: int


def _lines(text: str) -> list[list[_Token]]:
    """Tokens by logical line."""
    found: list[list[_Token]] = [[]]
    at = 0
    while at < len(text):
        at = _SKIP.match(text, at).end()  # type: ignore[union-attr]
        if at >= len(text):
            break
        if text[at] in "\n;&|":
            if found[-1]:
                found.append([])
            at += 1
            continue
        token = _TOKEN.match(text, at)
        if token is None:
            at += 1
            continue
        line = text.count("\n", 0, at) + 1
        found[-1].append(_Token(text=token[0], start=at, end=token.end(), line=line))
        at = token.end()
    return [line for line in found if line]


def _commands(text: str) -> list[list[_Token]]:
    """Logical lines in which `$ARGS` stands as the words that it was given, with the places of those."""
    words: dict[str, list[_Token]] = {}
    found = []
    for line in _lines(text):
        expanded: list[_Token] = []
        for token in line:
            assigned = _ASSIGN.fullmatch(token.text)
            if assigned is not None and re.search(r"\s", assigned[2]):
                words[assigned[1]] = _spliced(_inside(text, token, assigned), words)
            expanded += _spliced([token], words)
        found.append(expanded)
    return found


def _spliced(tokens: list[_Token], words: dict[str, list[_Token]]) -> list[_Token]:
    """The tokens, those that are a known variable replaced by its words."""
    found: list[_Token] = []
    for token in tokens:
        bare = _BARE.fullmatch(token.text)
        found += words.get(bare[1] or bare[2], [token]) if bare else [token]
    return found


def _inside(text: str, token: _Token, assigned: re.Match[str]) -> list[_Token]:
    """The words within an assigned text, where they stand."""
    start, end = token.start + assigned.start(2), token.end
    if text[start] in "'\"" and text[end - 1] == text[start]:
        start, end = start + 1, end - 1
    first = text.count("\n", 0, start)
    return [
        _Token(text=t.text, start=t.start + start, end=t.end + start, line=t.line + first)
        for line in _lines(text[start:end])
        for t in line
    ]


def _plain(text: str, variables: dict[str, str]) -> str:
    """Without quotes, with the variables that are known."""
    text = text.replace("\\\n", "")
    single = len(text) > 1 and text[0] == text[-1] == "'"
    bare = re.sub(r"""['"]""", "", text)
    if single:
        return bare

    def known(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name, match[2] if match[2] is not None else match[0])

    for _ in range(4):
        filled = _VARIABLE.sub(known, bare)
        if filled == bare:
            break
        bare = filled
    return bare


def typed(text: str) -> object:
    """`8` → 8, `1e-5` → 1e-05, `True` → true; else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def looks_like_command(text: str) -> bool:
    """Whether some line starts a training."""
    return any(_launcher(line)[0] for line in _commands(text)) or _quoted_command(text) is not None


def _quoted_command(text: str) -> str | None:
    """`srun bash -c '…'`: the text with all but the quoted command blanked, so that its places stay."""
    for match in _QUOTED.finditer(text):
        start, end = match.span(match.lastindex or 0)
        if any(_launcher(line)[0] for line in _lines(text[start:end])):
            before, after = (re.sub(r"[^\n]", " ", t) for t in (text[:start], text[end:]))
            return before + text[start:end] + after
    return None


def _launcher(line: list[_Token]) -> tuple[str, int]:
    """(launcher, index of the first word behind it); ("", 0) where the line starts no training."""
    words = [re.sub(r"""['"]""", "", t.text) for t in line]
    i = 0
    while i < len(words) and (
        _ASSIGN.fullmatch(words[i])
        or words[i] in ("export", "srun", "nohup", "exec", "time", "sudo", "env")
    ):
        i += 1
    while i < len(words) and words[i].startswith("-"):
        i += 1  # srun's own flags
    if i >= len(words):
        return "", 0
    word = words[i].rsplit("/", 1)[-1]
    if word in LAUNCHERS:
        if word == "accelerate":
            return (word, i + 2) if words[i + 1 : i + 2] == ["launch"] else ("", 0)
        if word in ("llamafactory-cli", "axolotl"):
            return (word, i + 2) if words[i + 1 : i + 2] == ["train"] else ("", 0)
        return word, i + 1
    if _PYTHON.fullmatch(words[i]) and "-m" in words[i + 1 : i + 3]:
        module = words.index("-m", i) + 1
        launcher = _MODULES.get(words[module]) if module < len(words) else None
        return (launcher, module + 1) if launcher else ("", 0)
    if _PYTHON.fullmatch(words[i]) and any(
        w.split("=")[0] in ("--deepspeed", "--deepspeed_config") for w in words
    ):
        return "python", i + 1
    return "", 0


def _node(value: object, token: _Token, key: _Token | None = None) -> Node:
    return Node(
        value=value, start=token.start, end=token.end, line=token.line,
        key_start=key.start if key else None, key_end=key.end if key else None,
        key_line=key.line if key else None,
    )  # fmt: skip


def _group(children: dict[str | int, Node], line: int) -> Node:
    starts = [c.key_start or c.start for c in children.values()]
    ends = [c.end for c in children.values()]
    return Node(
        value={k: c.value for k, c in children.items()}, start=min(starts, default=0),
        end=max(ends, default=0), line=line, children=children,
    )  # fmt: skip


def _flags(
    tokens: list[_Token], variables: dict[str, str], *, stop_at_word: bool
) -> tuple[dict[str | int, Node], int]:
    """(flags with their values, how many tokens they took)."""
    flags: dict[str | int, Node] = {}
    i = 0
    while i < len(tokens):
        token = tokens[i]
        text = _plain(token.text, variables)
        if not text.startswith("-"):
            if stop_at_word:
                break
            i += 1
            continue
        name, equals, value = text.lstrip("-").partition("=")
        name = name.replace("-", "_")
        following = tokens[i + 1] if i + 1 < len(tokens) else None
        if equals:
            flags[name] = _node(typed(value), token, token)
        elif following is None or name in _SWITCHES or re.match(r"--?[A-Za-z]", following.text):
            flags[name] = _node(True, token, token)
        else:
            flags[name] = _node(typed(_plain(following.text, variables)), following, token)
            i += 1
        i += 1
    return flags, i


_SBATCH = re.compile(r"^#SBATCH\s+(?:--nodes[= ]|-N\s*)(\d+)\s*(?:#.*)?$", re.M)


def _of_slurm(text: str) -> dict[str, str]:
    """What sbatch sets for the script, as its own directives say it (sbatch(1), output environment)."""
    nodes = _SBATCH.findall(text)
    return dict.fromkeys(("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), nodes[-1]) if nodes else {}


def parse_command(text: str, name: str, given: dict[str, str] | None = None) -> Node:
    """launcher, env, launch (its flags), script, settings (a file as its first word), args. Raises FileError.

    `given`: variables that are set outside of the text.
    """
    variables = _of_slurm(text) if given is None else dict(given)
    env: dict[str | int, Node] = {}
    for line in _commands(text):
        for token in line:
            assigned = _ASSIGN.fullmatch(token.text)
            if assigned is None and token.text != "export":
                break
            if assigned is not None:
                value = _plain(assigned[2], variables)
                variables[assigned[1]] = value
                env[assigned[1]] = _node(typed(value), token, token)
        launcher, at = _launcher(line)
        if not launcher:
            continue
        launch, used = _flags(line[at:], variables, stop_at_word=True)
        rest = line[at + used :]
        args, _ = _flags(rest[1:], variables, stop_at_word=False)
        first = line[max(at - 1, 0)]
        children: dict[str | int, Node] = {
            "launcher": _node(launcher, first), "env": _group(env, first.line),
            "launch": _group(launch, first.line), "args": _group(args, first.line),
        }  # fmt: skip
        if rest:
            children["script"] = _node(_plain(rest[0].text, variables), rest[0])
        settings = [_plain(token.text, variables) for token in rest[1:2]]
        if settings and settings[0].endswith((".yaml", ".yml", ".json")):
            children["settings"] = _node(settings[0], rest[1])
        return _group(children, first.line)
    inner = _quoted_command(text)
    if inner is not None:
        return parse_command(inner, name, variables)
    raise FileError(
        "no launch command is in it", where=f"{name}:1",
        why="a line that starts with deepspeed, torchrun, accelerate launch, or python … --deepspeed is looked for",
        do="pass the script that starts the training, or the configuration file itself",
    )  # fmt: skip
