"""Models, heads and token maps by their name on a hub -> paths on this machine.

    XiaomiMiMo/MiMo-7B-RL                                a model, or the head in it
    TencentBAC/FastMTP@70b3447                           ... at a branch, tag or commit
    thunlp/Qwen2-7B-Instruct-FR-Spec/freq_32768.pt       one file: a token map
    TencentBAC/FastMTP/fr_zh                             a folder that holds one token map

A path that exists is local, and so is a name whose first part is a folder here or one that the project's own
documentation uses (`models/x`): a typing error starts no download. Everything else of this form is looked for
on the Hugging Face Hub, or on ModelScope if the environment says FASTMTP_HUB=modelscope. What was downloaded
before is used again, without a network too. Only data is fetched: safetensors, JSON, text, and token maps,
which are read with `weights_only`; never code, never pickled weights. `push` brings an exported folder to the
same hub.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_token, is_offline_mode, snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from fastmtp.cli import InputError
from fastmtp.files import is_full
from fastmtp.formats.weights import INDEX
from fastmtp.inputs import SHIPPED, existing

SWITCH = "FASTMTP_HUB"
LOGIN = {"hf": "hf auth login", "modelscope": "modelscope login"}
TITLES = {"hf": "the Hugging Face Hub", "modelscope": "ModelScope"}
OURS = (*SHIPPED, "fastmtp", "models", "runs", "results", "data")  # first parts of paths in our documentation
PART = r"\w[\w.-]*"
FORM = re.compile(rf"(?P<repo>{PART}/{PART})(?P<path>(/{PART})*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
AT_BIRTH = {".gitattributes", "README.md", "LICENSE", "configuration.json"}  # what a hub itself puts there
TOKENIZER = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*")
MODEL = ("*.safetensors", *TOKENIZER)
BELOW = tuple(f"*/*{kind}" for kind in (".safetensors", ".json", ".txt", ".model"))  # other models' files

UNREACHABLE = {"TransportError", "ConnectionError", "NetworkError", "Timeout", "RequestTimeoutError"}
REASONS = (  # names of both libraries' errors, the special before the general
    ({"GatedRepoError"}, "its owner must let you in; ask on its page, then run: {login}"),
    ({"RepositoryNotFoundError"}, "no such repository, or a private one; check the name, or run: {login}"),
    ({"NotExistError"}, "no such repository or revision, or a private one; check the name, or run: {login}"),
    ({"RevisionNotFoundError"}, "no such revision; give a branch, a tag or a whole commit hash"),
    (
        {"AuthenticationError", "PermissionDeniedError"},
        "it wants a login with the right to do this; run: {login}",
    ),
    (
        {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "CacheNotFound"} | UNREACHABLE,
        "no network (or HF_HUB_OFFLINE is set), and it was not downloaded before, or not whole",
    ),
)


@dataclass(frozen=True)
class Name:
    """What a name says: `repo` is ORG/NAME, `path` a file or folder in it or "", `revision` None for the
    hub's default branch.
    """

    text: str
    repo: str
    path: str
    revision: str | None


def active() -> str:
    """The hub that names are looked for on: hf or modelscope. Raises InputError for another word."""
    hub = os.environ.get(SWITCH) or "hf"
    if hub not in TITLES:
        raise InputError(f"{SWITCH}={hub}: no such hub; give one of {', '.join(TITLES)}")
    return hub


def parse(text: str | Path) -> Name | None:
    """The parts of a hub name; None for a path that exists, or that only a local file can have."""
    form = FORM.fullmatch(str(text))
    if form is None or Path(text).exists():
        return None
    first = form["repo"].split("/")[0]
    local = first in OURS or Path(first).is_dir() or form["repo"].endswith(".gguf")
    if local and form["revision"] is None:
        return None
    return Name(str(text), form["repo"], form["path"].strip("/"), form["revision"])


def model(text: str | Path, files: Sequence[str] = MODEL, what: str = "model folder") -> Path:
    """The folder of a model: local, or downloaded if `text` is ORG/NAME or ORG/NAME@REVISION.

    Raises InputError if there is neither, and if the hub's has no weights in safetensors format.
    """
    name = parse(text)
    if name is None or name.path:
        if FORM.fullmatch(str(text)) and not Path(text).exists():
            raise InputError(f"{text}: no such {what}; check the path, or write {text}@main to ask a hub")
        return existing(text, what)
    _say(name)
    folder = fetch(name, files, BELOW)
    _check_whole(name, folder, files)
    return folder


def tokenizer(text: str | Path) -> Path:
    """The folder of a model's tokenizer: local, or downloaded without the weights. Raises InputError."""
    return model(text, TOKENIZER, "model folder")


def configuration(text: str | Path) -> Path | None:
    """The folder with a hub model's config.json, before its weights are downloaded; None if it is local."""
    name = parse(text)
    return None if name is None or name.path else fetch(name, ("config.json",))


@functools.cache
def head(text: str, prefix: str) -> Path | None:
    """The folder with a hub repository's files that hold tensors named `prefix`...; None for a local path."""
    name = parse(text)
    if name is None or name.path:
        return None
    _say(name)
    index = fetch(name, ("config.json", INDEX)) / INDEX
    files = ["*.safetensors"]
    if index.is_file():
        with contextlib.suppress(ValueError, AttributeError):  # what is wrong with it, its reader says
            files = [path for key, path in json.loads(index.read_bytes())["weight_map"].items()
                     if key.startswith(prefix)] or files  # fmt: skip
    return fetch(name, ("config.json", INDEX, *sorted(set(files))), BELOW)


@functools.cache
def token_map(text: str) -> str:
    """The path of a token map: as it is if local, else of the downloaded file.

    A folder's name is enough if the folder holds one .pt file. Raises InputError.
    """
    name = parse(text)
    if name is None or not name.path:
        return text
    _say(name)
    if PurePosixPath(name.path).suffix == ".pt":
        path = fetch(name, (name.path,)) / name.path
        if not path.is_file():
            raise InputError(
                f"{text}: {name.repo} on {TITLES[active()]} has no file {name.path}; check the name"
            )
        return str(path)
    folder = fetch(name, (f"{name.path}/*.pt",)) / name.path
    maps = sorted(folder.glob("*.pt"))
    if len(maps) != 1:
        listed = ", ".join(f"{name.repo}/{name.path}/{path.name}" for path in maps)
        raise InputError(
            f"{text}: {'several token maps; give one of ' + listed if maps else 'no token map (.pt) in it'}"
        )
    return str(maps[0])


def _say(name: Name) -> None:
    print(f"{name.text}: from {TITLES[active()]}; what is here already is used again", file=sys.stderr)


def fetch(name: Name, files: Sequence[str], but: Sequence[str] = ()) -> Path:
    """The folder with a repository's files that match one of `files` and none of `but`, downloaded if they
    are not there. Raises InputError in one line.
    """
    hub = active()
    download = _from_modelscope if hub == "modelscope" else _from_hf
    try:
        with _bars():
            return download(name, list(files), list(but), is_offline_mode())
    except InputError:
        raise
    except Exception as error:  # two libraries, each with a dozen kinds of its own
        if is_full(error):
            raise
        if _kinds(error) & UNREACHABLE:
            with contextlib.suppress(Exception), _bars():
                return download(name, list(files), list(but), True)
        raise InputError(
            f"{name.text}: no such path here, and {TITLES[hub]} did not give it: {_reason(error, hub)}"
        ) from None


def _from_hf(name: Name, files: list[str], but: list[str], offline: bool) -> Path:
    asked = {"allow_patterns": files, "ignore_patterns": but, "local_files_only": offline}
    return Path(snapshot_download(name.repo, revision=name.revision, **asked))


def _from_modelscope(name: Name, files: list[str], but: list[str], offline: bool) -> Path:
    api, _ = modelscope_api()
    if not offline:  # without an address from the user there are two sites to choose from
        api, _ = modelscope_api(api.resolve_endpoint_for_read(name.repo))
    asked = {"allow_patterns": files, "ignore_patterns": but, "local_files_only": offline}
    return Path(api.download_repo(name.repo, "model", revision=name.revision, **asked))


def modelscope_api(endpoint: str | None = None):
    """ModelScope's client, and its settings. Raises InputError if its package is not installed."""
    try:
        from modelscope_hub import HubApi, HubConfig
    except ImportError:
        raise InputError(
            f"{SWITCH}=modelscope needs the package modelscope; run: pip install -e '.[modelscope]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it prefers MODELSCOPE_ENDPOINT to MODELSCOPE_DOMAIN
        config = HubConfig(endpoint=endpoint)
        return HubApi(config=config), config


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _reason(error: BaseException, hub: str) -> str:
    """An error of either library in a few words, with what to do."""
    login = LOGIN[hub]
    for kinds, reason in REASONS:
        if _kinds(error) & kinds:
            return reason.format(login=login)
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _check_whole(name: Name, folder: Path, files: Sequence[str]) -> None:
    """InputError for a repository without safetensors, or a cache that holds a part of one."""
    hub = TITLES[active()]
    if not (folder / "config.json").is_file():
        raise InputError(f"{name.text}: {name.repo} on {hub} has no config.json; give a model's name")
    if "*.safetensors" not in files:
        return
    index = folder / INDEX
    listed = json.loads(index.read_bytes()).get("weight_map", {}).values() if index.is_file() else []
    absent = sorted({path for path in listed if not (folder / path).is_file()})
    if absent:
        raise InputError(
            f"{name.text}: only a part was downloaded ({absent[0]} is missing); run it again with a network"
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{name.text}: no weights in safetensors format on {hub}; pickled ones are never downloaded, "
            "because they can run code"
        )


def origin(text: str | Path, folder: Path) -> dict[str, str]:
    """For a record: where the model `text`, found in `folder`, came from; {} for a local one."""
    name = parse(text)
    return {} if name is None else {"hub": active(), "repo": name.repo, "revision": folder.name}


def files_of(repo: str) -> set[str] | None:
    """The paths in a repository; None if there is none. For a push, so with the user's token.

    Raises InputError in one line, for a missing or wrong token too.
    """
    hub = active()
    if hub == "hf" and not get_token():
        raise InputError(f"--push {repo}: no token for {TITLES[hub]}; run {LOGIN[hub]}, or set HF_TOKEN")
    try:
        if hub == "hf":
            api = HfApi()
            api.whoami()
            return set(api.list_repo_files(repo)) if api.repo_exists(repo) else None
        api, config = modelscope_api()
        if not config.token:
            raise InputError(
                f"--push {repo}: no token for {TITLES[hub]}; run {LOGIN[hub]}, or set MODELSCOPE_API_TOKEN"
            )
        api.whoami()
        listed = api.list_repo_files(repo, "model") if api.repo_exists(repo, "model") else None
        return None if listed is None else {getattr(file, "path", file) for file in listed}
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--push {repo}: {TITLES[hub]} refuses ({_reason(error, hub)})") from None


def push(folder: Path, repo: str, new: bool, but: Sequence[str]) -> str:
    """Upload a folder's files, except those named in `but`, and return the repository's address.

    A new repository is private; one that is there keeps what it has beside these files. Raises InputError.
    """
    hub = active()
    try:
        with _bars():
            if hub == "modelscope":
                api, config = modelscope_api()
                if new:
                    api.create_repo(repo, "model", visibility="private")
                api.upload_folder(repo, "model", folder, ignore_patterns=list(but), use_cache=False)
                return f"{config.endpoint}/models/{repo}"
            if new:
                HfApi().create_repo(repo, private=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=list(but))
            return f"{constants.ENDPOINT}/{repo}"
    except Exception as error:
        raise InputError(
            f"--push {repo}: the folder {folder} is written, but {TITLES[hub]} did not take it "
            f"({_reason(error, hub)}); the same command tries again"
        ) from None


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Libraries draw their bars on a terminal alone; a log file gets none."""
    if sys.stderr.isatty():
        yield
        return
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if not before:
            enable_progress_bars()
