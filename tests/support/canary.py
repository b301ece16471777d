"""Code of an evaluation task that looks for secrets wherever it can."""

CANARY = '''
import os, socket, stat, tempfile

HOME = os.environ.get("LEWIS_HOME", "/nowhere")
PLACES = {"/tmp", "/var/tmp", "/dev/shm", "/run", tempfile.gettempdir(), HOME, os.path.dirname(HOME)}
PLACES |= {os.path.expanduser("~")}
BIG = ("site-packages", "node_modules", ".git", ".pyenv", ".cache", ".cargo", ".rustup", "recipe", "hub")
LONGEST = 1 << 24  # bytes of a file that are read: databases have some MB


def files():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        yield from (f"/proc/{pid}/{name}" for name in ("environ", "cmdline"))
        try:
            yield from (f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            pass
    for place in PLACES:
        for folder, inside, names in os.walk(place):
            inside[:] = [each for each in inside if each not in BIG]
            yield from (f"{folder}/{name}" for name in names)


def abstract():
    """The addresses of sockets without a file; the kernel lists those of this network."""
    with open("/proc/net/unix", errors="replace") as file:
        named = (line.split(maxsplit=7)[7:] for line in file)
        return ["\\0" + each[1:].rstrip("\\n") for name in named for each in name if each.startswith("@")]


def answers(address):
    try:
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(1)
            asked.connect(address)
        return True
    except OSError:
        return False


def other_processes(secret):
    """The children of the first process, and the processes that have the secret in their heap, without this one."""
    children, knowing = [], []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[1] == "1":
                    children.append(pid)
            with open(f"/proc/{pid}/maps") as file:
                heaps = [line.split()[0].split("-") for line in file if line.endswith("[heap]\\n")]
            with open(f"/proc/{pid}/mem", "rb", 0) as memory:
                for start, end in heaps if pid != os.getpid() else ():
                    memory.seek(int(start, 16))
                    if secret.encode() in memory.read(int(end, 16) - int(start, 16)):
                        knowing.append(pid)
        except OSError:
            pass
    return children, knowing


def look(*secrets, sockets=()):
    """How many files were read, which hold one of the secrets or are sockets that answer, and the network's devices.

    `sockets` are more addresses to try.
    """
    seen, found = 0, []
    for path in files():
        try:
            kind = os.stat(path).st_mode
            if stat.S_ISSOCK(kind) and answers(path):
                found.append(path)
            if stat.S_ISREG(kind):  # a pipe would be waited for
                with open(path, "rb") as file:
                    text = file.read(LONGEST)
                seen += 1
                found += [path for each in secrets if each.encode() in text]
        except OSError:
            pass
    return seen, found + [each for each in (*sockets, *abstract()) if answers(each)], socket.if_nameindex()
'''
