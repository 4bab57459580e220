"""Makes the texts of the evidence runs from a Debian package of the Linux kernel's source.

    python prepare_data.py --out DIRECTORY [--package linux-source-6.1] [--deb FILE]

writes code.txt.xz (C of the kernel, its file systems, network, sound and some drivers, without generated register
headers) and prose.txt.xz (its documentation), documents in the order of their paths and ended by a NUL byte each, and
sources.json: package, version, SHA-256 of package and texts, documents and bytes. It downloads with apt-get, which must
know the package; --deb takes one that is here already. `tokens.py` makes tokens of the texts where they are used.
"""

import argparse
import hashlib
import json
import lzma
import subprocess
import tarfile
import tempfile
from pathlib import Path

CODE = (
    *("block", "crypto", "fs", "include", "init", "io_uring", "ipc", "kernel", "lib", "mm", "net", "security"),
    *("sound", "virt", "drivers/scsi", "drivers/usb"),
)
PROSE = ("Documentation",)


def kind_of(path: str) -> str | None:
    """The text ("code", "prose") that a file of the source belongs to, or None."""
    if path.endswith((".c", ".h")) and any(path.startswith(part + "/") for part in CODE):
        return "code"
    if path.endswith((".rst", ".txt")) and any(path.startswith(part + "/") for part in PROSE):
        return "prose"
    return None


def download(package: str, directory: str) -> Path:
    """The package's file, downloaded with apt-get."""
    subprocess.run(["apt-get", "download", package], cwd=directory, check=True)
    found = list(Path(directory).glob(f"{package}_*.deb"))
    if len(found) != 1:
        raise RuntimeError(f"apt-get download {package} left {len(found)} packages; expected one")
    return found[0]


def documents(deb: Path) -> dict[str, dict[str, bytes]]:
    """Contents of the package's files by text and path."""
    texts: dict[str, dict[str, bytes]] = {"code": {}, "prose": {}}
    package = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=package.stdout, mode="r|") as outer:
        for member in outer:
            if not (member.isfile() and member.name.endswith(".tar.xz")):
                continue
            with tarfile.open(fileobj=outer.extractfile(member), mode="r|xz") as source:
                for file in source:
                    path = file.name.partition("/")[2]
                    kind = kind_of(path) if file.isfile() else None
                    if kind is not None:
                        texts[kind][path] = source.extractfile(file).read().replace(b"\0", b"")
    if package.wait() != 0 or not all(texts.values()):
        raise RuntimeError(f"{deb} is not a package with the kernel's source in a .tar.xz")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--package", default="linux-source-6.1", help="Debian package (default: %(default)s)")
    parser.add_argument("--deb", type=Path, help="the package's file, instead of a download")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        deb = arguments.deb or download(arguments.package, directory)
        version = subprocess.run(
            ["dpkg-deb", "-f", deb, "Package", "Version"], capture_output=True, text=True, check=True
        )
        sources = {
            "package": dict(line.split(": ") for line in version.stdout.splitlines()),
            "sha256": hashlib.sha256(deb.read_bytes()).hexdigest(),
        }
        texts = documents(deb)
    for kind, files in texts.items():
        text = b"".join(files[path] + b"\0" for path in sorted(files))
        (arguments.out / f"{kind}.txt.xz").write_bytes(lzma.compress(text, preset=7))
        sources[kind] = {
            "documents": len(files),
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
            "compressed_bytes": (arguments.out / f"{kind}.txt.xz").stat().st_size,
        }
    (arguments.out / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")
    print(json.dumps(sources, indent=2))


if __name__ == "__main__":
    main()
