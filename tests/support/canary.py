"""Code of an evaluation task that looks for secrets wherever it can."""

CANARY = '''
import os, socket, tempfile

HOME = os.environ.get("LEWIS_HOME", "/nowhere")
PLACES = {"/tmp", "/var/tmp", "/dev/shm", "/run", tempfile.gettempdir(), HOME, os.path.dirname(HOME)}
PLACES |= {os.path.expanduser("~")}
BIG = ("site-packages", "node_modules", ".git", ".pyenv", ".cache", ".cargo", ".rustup", "recipe", "hub")


def files():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        yield from (f"/proc/{pid}/{name}" for name in ("environ", "cmdline"))
    for place in PLACES:
        for folder, inside, names in os.walk(place):
            inside[:] = [each for each in inside if each not in BIG]
            yield from (f"{folder}/{name}" for name in names)


def look(*secrets):
    """How many files were read, which hold one of the secrets or are sockets that answer, and the network's devices."""
    seen, found = 0, []
    for path in files():
        try:
            with open(path, "rb") as file:
                text = file.read(1 << 20)
            seen += 1
            found += [path for each in secrets if each.encode() in text]
        except OSError:
            try:
                with socket.socket(socket.AF_UNIX) as asked:
                    asked.settimeout(1)
                    asked.connect(path)
                found.append(path)
            except OSError:
                pass
    return seen, found, socket.if_nameindex()
'''
