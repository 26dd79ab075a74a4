"""Files of models and fits that are damaged or hostile: a named error, soon, in little memory."""

import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
from hashlib import sha256

import numpy as np
import pytest
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as tensor_bytes

import ppl_vae
from killed import forked, replaced
from ppl_vae.cli.main import main
from ppl_vae.data.files.tables import Table
from ppl_vae.fitted.fit import fit_table
from ppl_vae.fitted.folder import CHECKPOINT, METADATA, RUN, UNFINISHED, load_fitted, save_fitted
from ppl_vae.fitted.settings import FitSettings, Run
from ppl_vae.inference.svi.checkpoints.checkpoint import DIGEST_SIZE
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.models.storage import CONFIG, WEIGHTS

OF_PYTHON = "fit.pt"
"""The checkpoint of a fit that no command has made."""
SECONDS, MEMORY = 30, 3 * 2**30
"""What a process may take, at most, to refuse a file; the address space beyond what it has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a fitted VAE, by name, with its table and its checkpoint."""
    path = tmp_path_factory.mktemp("good") / "m"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(30, 4))
    csv = path.with_name("x.csv")
    np.savetxt(csv, x, delimiter=",", header="a,b,c,d", comments="")
    settings = FitSettings(model="vae", latent_dim=2, hidden=(4,), epochs=30, held_out=0.0)
    path.mkdir()
    fitted = fit_table(
        Table("x.csv", x, tuple("abcd")), settings, checkpoint=path / CHECKPOINT, progress=False
    )
    save_fitted(fitted, path, Run(str(csv), {}, settings.to_plain()))
    (path / UNFINISHED).write_bytes((path / RUN).read_bytes())
    continued(path)
    return path


def edited_json(data, path, value):
    return json.dumps(replaced(json.loads(data), path, value)).encode()


def nested(depth):
    return b"[" * depth + b"]" * depth


def laughs(depth=12, width=10):
    """A list that is small in memory and whose text would have ``width ** depth`` entries."""
    value = [0]
    for _ in range(depth):
        value = [value] * width
    return value


def sealed(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return sha256(buffer.getvalue()).digest() + buffer.getvalue()


def unsealed(data):
    return torch.load(io.BytesIO(data[DIGEST_SIZE:]), weights_only=True)


def edited(data, path, value):
    """A checkpoint with another value at a path, under a right checksum."""
    return sealed(replaced(unsealed(data), path, value))


def compressed(data):
    """A checkpoint of a hundred kilobytes that becomes 64 MiB."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data[DIGEST_SIZE:])) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.infolist():
            content = old.read(part)
            is_first = part.filename.endswith("/data/0")
            new.writestr(part.filename, bytes(2**26) if is_first else content)
    return sha256(buffer.getvalue()).digest() + buffer.getvalue()


def header_of(size):
    return struct.pack("<Q", size) + b"{}"


def flipped(data, seed):
    """One to three bits are changed."""
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range(1 + seed % 3):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def shared(number):
    """A tensor of this size in the memory of one number."""
    return torch.zeros(1).expand(number)


ANY = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "last byte": lambda data: data[:-1],
    "twice": lambda data: data + data,
    "zeros": lambda data: bytes(len(data)),
    "random": lambda data: random.Random(0).randbytes(len(data)),
    "text": lambda data: b"this is no such file\n",
    "list": lambda data: b"[1, 2, 3]",
    "number": lambda data: b"7",
    "utf-16": lambda data: "{}".encode("utf-16"),
    "pickle": lambda data: b"cos\nsystem\n(S'false'\ntR.",
    "nested": lambda data: nested(100_000),
    "digits": lambda data: b'{"format": ' + b"9" * 100_000 + b"}",
    **{f"flipped {k}": lambda data, k=k: flipped(data, k) for k in range(6)},
}
"""Changes of a file's content that every reader must bear."""
CONSTRUCTOR = ("constructor", "arguments")
OWN = {
    CONFIG: {
        "sizes of 20 TB": lambda d: edited_json(
            d, (*CONSTRUCTOR, "hidden"), [2_000_000, 1_000_000]
        ),
        "a size of 10^18": lambda d: edited_json(d, (*CONSTRUCTOR, "data_dim"), 10**18),
        "a negative size": lambda d: edited_json(d, (*CONSTRUCTOR, "latent_dim"), -1),
        "another name": lambda d: edited_json(d, ("constructor", "name"), "os.system"),
        "aliases of themselves": lambda d: edited_json(d, ("aliases",), {"a": "a"}),
        "aliases that are a list": lambda d: edited_json(d, ("aliases",), ["a"]),
        "another checksum": lambda d: edited_json(d, ("sha256",), "../../etc/passwd"),
        "another program": lambda d: edited_json(d, ("program",), "PPCA"),
        "frozen": lambda d: edited_json(d, ("frozen",), ["nothing"]),
        "format": lambda d: edited_json(d, ("format",), 99),
        "no likelihood": lambda d: edited_json(d, (*CONSTRUCTOR, "likelihood"), None),
        "a million widths": lambda d: edited_json(d, (*CONSTRUCTOR, "hidden"), [1] * 10**6),
    },
    WEIGHTS: {
        "a header of 2^64": lambda d: header_of(2**64 - 1),
        "a header of 2^40": lambda d: header_of(2**40),
        "no tensors": lambda d: header_of(2),
    },
    METADATA: {
        "scale": lambda d: edited_json(d, ("scale",), [0.0, 1.0, 1.0, 1.0]),
        "loc": lambda d: edited_json(d, ("loc",), [1e999] * 4),
        "width": lambda d: edited_json(d, ("columns",), ["a"]),
        "columns": lambda d: edited_json(d, ("columns",), [1, 2, 3, 4]),
        "rows": lambda d: edited_json(d, ("train_rows",), ["a"]),
        "history": lambda d: edited_json(d, ("history",), []),
        "digest": lambda d: edited_json(d, ("program_digest",), "0" * 64),
        "deep": lambda d: edited_json(d, ("notes",), laughs(3)),
    },
    RUN: {
        "unknown": lambda d: b"[other]\n",
        "type": lambda d: b"table = 3\n",
        "setting": lambda d: b'[fit]\nlatent_dim = "many"\n',
        "table": lambda d: b'table = "/dev/zero"\n',
        "no table": lambda d: b'table = "/nothing/here.csv"\n',
        "option": lambda d: d + b"\n[read]\nskip_rows = true\n",
        "digits": lambda d: b"[fit]\nepochs = " + b"9" * 100_000,
        "deep": lambda d: b"table = " + nested(50_000),
    },
    CHECKPOINT: {
        "laughs": lambda d: edited(d, ("fingerprint", "x"), laughs()),
        "laughs in place of a setting": lambda d: edited(d, ("fingerprint", "lr"), laughs()),
        "values": lambda d: edited(d, ("values",), laughs()),
        "optimizer": lambda d: edited(d, ("optimizer", "param_groups"), laughs()),
        "best": lambda d: edited(d, ("best",), laughs()),
        "a shared number": lambda d: edited(d, ("state",), [shared(10**12)] * 9),
        "a shared setting": lambda d: edited(d, ("fingerprint", "x"), shared(10**12)),
        "steps": lambda d: edited(d, ("num_steps",), 10**30),
        "one tensor": lambda d: sealed(torch.zeros(3)),
        "no entries": lambda d: sealed({}),
        "no settings": lambda d: edited(d, ("fingerprint",), {}),
        "compressed": compressed,
    },
}
WEIGHT_CHANGES = {
    "nan": lambda t: t.fill_(torch.nan),
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "truth values": lambda t: t > 0,
    "another shape": lambda t: t[None],
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
}
"""Changes of a tensor under a right checksum."""


def other_weights(folder, change):
    """Change each tensor, and state the new checksum."""
    tensors = tensors_of((folder / WEIGHTS).read_bytes())
    data = tensor_bytes({name: change(t.clone()).contiguous() for name, t in tensors.items()})
    (folder / WEIGHTS).write_bytes(data)
    config = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(edited_json(config, ("sha256",), sha256(data).hexdigest()))


def in_place_of(path, kind):
    """Put something that is no regular file in the place of one."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**43)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to({"device": "/dev/zero", "nothing": "nothing"}[kind])


KINDS = ("folder", "pipe", "sparse", "loop", "device", "nothing")


def command(*arguments):
    def run():
        sys.argv = ["ppl-vae", *map(str, arguments)]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"status {end.code}") from end

    return run


def continued(folder):
    """A fit from Python that has a checkpoint in a folder."""
    vae = ppl_vae.VAE.mlp(4, 2, hidden=(4,), seed=0)
    x = torch.arange(40.0).reshape(10, 4).sin()
    settings = {"steps": 30, "x_val": x, "seed": 0, "capture": False, "progress": False}
    fit_svi(vae.model, vae.guide, x, checkpoint=folder / OF_PYTHON, **settings)


READERS = {
    "load": ((CONFIG, WEIGHTS), lambda folder: lambda: ppl_vae.load(folder)),
    "load_fitted": ((CONFIG, WEIGHTS, METADATA), lambda folder: lambda: load_fitted(folder)),
    "fit_svi": ((OF_PYTHON,), lambda folder: lambda: continued(folder)),
    "score": (
        (CONFIG, WEIGHTS, METADATA),
        lambda folder: command("score", folder, folder.parent / "x.csv"),
    ),
    "sample": ((CONFIG, WEIGHTS, METADATA), lambda folder: command("sample", folder, "-n", 3)),
    "fit --config": (
        (RUN,),
        lambda folder: command("fit", "--config", folder / RUN, "--out", folder.parent / "new"),
    ),
    "fit --resume": (
        (UNFINISHED, CHECKPOINT),
        lambda folder: command("fit", "--resume", "--out", folder),
    ),
}
"""For each entry point the files that it reads."""


def limited(work):
    """Run in a child process with a limit on memory and time: its status, and what it wrote."""
    ours, theirs = os.pipe()

    def run():
        os.dup2(theirs, 2)
        sys.stderr = os.fdopen(os.dup(theirs), "w", buffering=1)  # pytest has replaced it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        try:
            work()
        except Exception as error:
            os.write(2, f"\n{type(error).__name__}: {error}\n".encode()[:5000])
            os._exit(1)

    pid, begin = forked(run), time.monotonic()
    os.close(theirs)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > begin + SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    with os.fdopen(ours, "rb") as file:
        written = file.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(ended[1]), written


def changes():
    """Every change of a file, by the names of the file and of the change."""
    for name in (CONFIG, WEIGHTS, METADATA, RUN, UNFINISHED, CHECKPOINT, OF_PYTHON):
        like = {UNFINISHED: RUN, OF_PYTHON: CHECKPOINT}.get(name, name)
        for change, function in (ANY | OWN[like]).items():
            if like == RUN and change == "half":
                continue  # a part of a configuration may be one
            yield name, change, lambda path, f=function: path.write_bytes(f(path.read_bytes()))
        for kind in KINDS:
            yield name, kind, lambda path, kind=kind: in_place_of(path, kind)
    for change, function in WEIGHT_CHANGES.items():
        yield WEIGHTS, change, lambda path, f=function: other_weights(path.parent, f)


HARMLESS = {
    *((name, "last byte") for name in (CONFIG, METADATA, RUN, UNFINISHED)),  # a line end
    (CONFIG, "no likelihood"),  # the default
    *((name, "steps") for name in (OF_PYTHON, CHECKPOINT)),  # a longer fit
}
"""Changes after which a file means the same."""
OF_TABLES = {"table", "no table", "flipped 2"}
"""Changes of a configuration that name another table, whose name is then in the message."""


def check_refused(name, change, status, text):
    """One error that names the file, and no traceback; what is harmless may go on."""
    if status == 0:
        assert (name, change) in HARMLESS, (name, change, text)
        return
    assert status == 1 and "Traceback" not in text, (name, change, status, text)
    named = name in text or (name in (RUN, UNFINISHED) and change in OF_TABLES)
    assert named, (name, change, text)


def refusals(folder, tmp_path, readers, step=1):
    """Change one file after the other, and let each reader read it; the number of refusals."""
    refused = 0
    for name, change, apply in list(changes())[::step]:
        for reader in readers:
            names, make = READERS[reader]
            if name not in names:
                continue
            copy = tmp_path / "copy"
            shutil.copytree(folder.parent, copy)
            apply(copy / folder.name / name)
            status, text = limited(make(copy / folder.name))
            check_refused(name, change, status, text)
            refused += status != 0
            shutil.rmtree(copy)
    return refused


@pytest.fixture(scope="module")
def imported(folder):
    """What the readers import is imported."""
    for _, make in READERS.values():
        make(folder)
    for name in ("fitting", "applying"):
        importlib.import_module(f"ppl_vae.cli.{name}")


def test_a_damaged_file_is_refused_by_name(folder, tmp_path):
    assert refusals(folder, tmp_path, ("load_fitted", "fit_svi"), step=9) > 10


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_every_damage_is_refused_by_name(reader, folder, imported, tmp_path):
    refused = refusals(folder, tmp_path, [reader])
    print(f"\n{reader}: {refused} changes refused")
    assert refused > 20
