"""Keep secrets from a process that evaluates: variables without them, and Linux namespaces where the machine allows it.

In its namespaces it sees no other processes, whose environment holds secrets, and not the files in which secrets
usually are. If no document is read from another machine, it has no network. Where namespaces cannot be made, it runs
without them. For an ordinary user they hold against any code. Root can leave them.
"""

import functools
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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
    *(".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", ".prefect", ".config/gh", ".config/gcloud", ".netrc"),
    *(".git-credentials", ".pgpass", ".pypirc", ".npmrc", ".bash_history", ".cache/huggingface/token"),
    ".cache/huggingface/stored_tokens",
)
_NAMED = ("HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "NETRC", "GOOGLE_APPLICATION_CREDENTIALS")

# $1: the number of places to hide; then the places; then the command.
_SETUP = """
set -eu
number=$1; shift
while [ "$number" -gt 0 ]; do
    if [ -d "$1" ]; then mount -t tmpfs -o size=4k,mode=700 hidden "$1"
    elif [ -f "$1" ]; then mount --bind /dev/null "$1"
    fi
    shift; number=$((number - 1))
done
exec "$@"
"""


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """What an evaluation needs of a worker's environment. Variables that are not known to be harmless are left out."""
    known = {name: value for name, value in environment.items() if name in _NAMES or name.startswith(_PREFIXES)}
    return {name: value for name, value in known.items() if not name.endswith(_SECRET)} | FIXED


def way_to_the_hub(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process needs in addition to read documents from the Hub: its address and the proxies."""
    return {name: environment[name] for name in _WAY_TO_THE_HUB if name in environment}


def namespaces(secrets: Sequence[Path] = (), *, network: bool) -> tuple[str, ...]:
    """What to write before a command so that it runs in namespaces; nothing where they cannot be made.

    Args:
        secrets: more files and folders to hide; those that do not exist are left out.
        network: whether the process needs to reach other machines.
    """
    if not _possible():
        return ()
    return _prefix(
        [str(place) for place in dict.fromkeys((*_usual_secrets(os.environ), *secrets)) if place.exists()], network
    )


@functools.cache
def _possible() -> bool:
    try:
        done = subprocess.run([*_prefix([os.devnull], False), "true"], capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        logger.warning("evaluations run without namespaces, as this machine does not allow them: %s", problem)
    return not problem


def _prefix(places: Sequence[str], network: bool) -> tuple[str, ...]:
    kinds = ["--mount", "--pid", "--ipc", "--mount-proc", "--fork", "--kill-child=SIGKILL"]
    kinds += [] if network else ["--net"]
    drop: tuple[str, ...] = ()
    if os.geteuid() != 0:
        kinds += ["--user", "--map-current-user", "--keep-caps"]  # the mounts need capabilities in the namespace
        drop = ("setpriv", "--no-new-privs", "--ambient-caps=-all", "--inh-caps=-all", "--bounding-set=-all")
    return ("unshare", *kinds, "--", "sh", "-c", _SETUP, "evaluation", str(len(places)), *places, *drop)


def _usual_secrets(environment: Mapping[str, str]) -> Iterator[Path]:
    for name in _IN_HOME:
        yield Path.home() / name
    for name in ("token", "stored_tokens"):
        yield Path(environment.get("HF_HOME", "~/.cache/huggingface")).expanduser() / name
    for name in _NAMED:
        if environment.get(name, os.devnull) != os.devnull:
            yield Path(environment[name]).expanduser()
