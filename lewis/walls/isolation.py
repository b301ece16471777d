"""Keep secrets from an evaluation's process, by its environment, and by Linux namespaces where the machine allows them.

In its namespaces the process sees neither other processes, whose environment holds secrets, nor the files in which
secrets usually are. Of the folders for temporary files it sees only what it needs: Prefect's worker keeps its whole
environment in a file there while a run lives. Sockets of other processes are hidden. If no document is read from
another machine, it has no network. It cannot undo the mounts, not even as root, as it has given up root's capabilities.
Where namespaces cannot be made, it runs without them.
"""

import functools
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lewis import settings
from lewis.errors import InputError

logger = logging.getLogger(__name__)

_NAMES = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "LEWIS_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("CURL_CA_BUNDLE", "HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE"),
    *("HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    *("HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"),
    *("HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"),
)
_PREFIXES = (
    *("LC_", "XDG_", "PYTHON", "COV_", "COVERAGE_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "NUMBA_", "GOMP_"),
    *("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "CUDNN_", "NCCL_", "NVIDIA_", "ROCR_"),
    *("HIP_", "HSA_", "MALLOC_", "VLLM_", "SGLANG_", "FLASHINFER_"),
)
_SECRET = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")
_WAY_TO_THE_HUB = (  # URLs, which may hold a password
    *("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
    *("NO_PROXY", "no_proxy"),
)

FIXED = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_TOKEN_PATH": os.devnull,  # else the libraries read the token that is saved in HF_HOME
    "DO_NOT_TRACK": "1",
    "DISABLE_MULTIPROC": "1",  # else lm-eval's bootstrap forks one worker per core
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}

_IN_HOME = (
    *(".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", ".prefect", ".mlflow", ".netrc", ".git-credentials"),
    *(".pgpass", ".pypirc", ".npmrc", ".bash_history", ".databrickscfg", ".boto", ".s3cfg", ".vault-token"),
    *(".cache/huggingface/token", ".cache/huggingface/stored_tokens"),
)
_IN_CONFIG = ("gh", "gcloud", "git", "rclone", "containers")  # of ~/.config, or XDG_CONFIG_HOME
_NAMED = (
    *("HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "NETRC", "GOOGLE_APPLICATION_CREDENTIALS"),
    *("PREFECT_HOME", "MLFLOW_AUTH_CONFIG_PATH", "SSH_AUTH_SOCK", "KUBECONFIG", "DOCKER_CONFIG", "PGPASSFILE"),
)

_INSTALLED = ("/etc/lewis/secrets", "/etc/lewis/environment")  # as deployments/INSTALL.md and deployments/systemd say
_SOCKETS = ("/run/user", "/run/secrets", "/run/docker.sock", "/run/containerd", "/run/podman")
_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")

# Arguments: for each folder of which only a part is shown, the folder, the number of its entries that are shown, and
# their names. Then "--", the number of places to hide, the places, and the command.
_SETUP = """
set -eu
here=$PWD
while [ "$1" != -- ]; do
    folder=$1 number=$2; shift 2
    cd "$folder"  # the folder as it was, also when the mount covers it
    mount -t tmpfs -o mode=1777 temporary "$folder"
    while [ "$number" -gt 0 ]; do
        if [ -d "./$1" ]; then mkdir "$folder/$1"; else : > "$folder/$1"; fi
        mount --no-canonicalize --rbind "./$1" "$folder/$1"
        shift; number=$((number - 1))
    done
done
number=$2; shift 2
cd /
while [ "$number" -gt 0 ]; do
    if [ -d "$1" ]; then mount -t tmpfs -o size=4k,mode=700 hidden "$1"
    elif [ -e "$1" ]; then mount --bind /dev/null "$1" || [ ! -e "$1" ]  # a socket that has gone meanwhile
    fi
    if [ -f "$1" ]; then echo "$1 cannot be hidden" >&2; exit 1; fi
    shift; number=$((number - 1))
done
cd "$here" 2>/dev/null || cd /
exec "$@"
"""


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of an evaluation: those variables of the worker that are known to be harmless, and `FIXED`."""
    known = {name: value for name, value in environment.items() if name in _NAMES or name.startswith(_PREFIXES)}
    return {name: value for name, value in known.items() if not name.endswith(_SECRET)} | FIXED


def way_to_the_hub(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a process also needs if it reads documents from the Hub: the Hub's address and the proxies."""
    return {name: environment[name] for name in _WAY_TO_THE_HUB if name in environment}


def namespaces(secrets: Sequence[Path] = (), *, network: bool, shown: Iterable[Path] = ()) -> tuple[str, ...]:
    """The words before a command that make it run in namespaces; empty where namespaces cannot be made.

    Args:
        secrets: more files and folders to hide; those that do not exist are left out.
        network: whether the process needs to reach other machines.
        shown: files and folders that the process needs. Of a folder for temporary files only those entries stay
            visible, with all that is in them, that are or hold one of these.
    """
    if not _possible():
        return ()
    needed = list(shown)
    kept = {parent for path in needed for parent in (path, *path.parents)}
    places = dict.fromkeys((*_usual_secrets(os.environ), *_sockets(), *secrets))
    hidden = [str(place) for place in places if place not in kept and os.path.exists(place)]
    return _prefix(hidden, temporary_folders(needed), network)


def temporary_folders(needed: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Each existing folder for temporary files, outer ones first -> names of its entries that are or hold needed paths.

    Args:
        needed: files and folders; links among them are followed.
    """
    folders = {Path(each).resolve() for each in (*_TEMPORARY, tempfile.gettempdir())}
    paths = folders.union(*((Path(os.path.abspath(path)), path.resolve()) for path in needed))  # one may be in another
    return {
        str(folder): tuple(
            sorted({path.relative_to(folder).parts[0] for path in paths if folder in path.parents and path.exists()})
        )
        for folder in sorted(folders)
        if folder.is_dir()
    }


def check() -> None:
    """Check that code which a recipe or a model brings may run on this machine.

    Raises:
        InputError: if no namespaces can be made, and `settings.CODE_NEEDS_NAMESPACES` is on.
    """
    if settings.CODE_NEEDS_NAMESPACES.get() and not _possible():
        raise InputError(
            "evaluate: expected a machine that allows namespaces, for code that the recipe brings "
            f"({settings.CODE_NEEDS_NAMESPACES.name}=1), got one that does not; score on another machine, or set "
            f"{settings.CODE_NEEDS_NAMESPACES.name}=0 to let it run without"
        )


@functools.cache
def _possible() -> bool:
    try:
        command = [*_prefix([os.devnull], temporary_folders(()), False), "true"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        logger.warning("evaluations run without namespaces, as this machine does not allow them: %s", problem)
    return not problem


def _prefix(places: Sequence[str], temporary: Mapping[str, Sequence[str]], network: bool) -> tuple[str, ...]:
    kinds = ["--mount", "--pid", "--ipc", "--mount-proc", "--fork", "--kill-child=SIGKILL"]
    kinds += [] if network else ["--net"]
    kept = "-all,+dac_override"  # root's way to files of other users, such as of a model
    if os.geteuid() != 0:
        kinds += ["--user", "--map-current-user", "--keep-caps"]  # the mounts need capabilities in the namespace
        kept = "-all"
    drop = ("setpriv", "--no-new-privs", "--ambient-caps=-all", "--inh-caps=-all", f"--bounding-set={kept}")
    parts = [word for folder, names in temporary.items() for word in (folder, str(len(names)), *names)]
    setup = ("sh", "-c", _SETUP, "evaluation", *parts, "--", str(len(places)), *places)
    return ("unshare", *kinds, "--", *setup, *drop)


def _sockets() -> Iterator[Path]:
    """The sockets to hide: through one, code could make another process do something outside the namespaces."""
    yield from map(Path, _SOCKETS)
    try:
        lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    except OSError:
        return
    named = (line.split(maxsplit=7)[7:] for line in lines)
    yield from (Path(path) for name in named for path in name if path.startswith("/"))


def _usual_secrets(environment: Mapping[str, str]) -> Iterator[Path]:
    from huggingface_hub import constants

    for name in _IN_HOME:
        yield Path.home() / name
    for config in {Path.home() / ".config", Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config")}:
        yield from (config.absolute() / name for name in _IN_CONFIG)
    for folder in (constants.HF_HOME, os.path.dirname(constants.HF_TOKEN_PATH)):  # HF_HOME may be in XDG_CACHE_HOME
        yield from (Path(folder).absolute() / name for name in ("token", "stored_tokens"))
    yield from map(Path, _INSTALLED)
    in_files = [f"{name}_FILE" for name in settings.IN_FILES]
    in_files += [name for name in environment if name.endswith(tuple(f"{each}_FILE" for each in _SECRET))]
    for name in (*_NAMED, *in_files):
        given = environment.get(name, "")
        for path in dict.fromkeys((given, *given.split(os.pathsep))):  # KUBECONFIG may name several
            if path not in ("", os.devnull):
                yield Path(path).expanduser().absolute()
