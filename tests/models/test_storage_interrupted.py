"""A save that is interrupted, or fails, leaves the old program or the new one."""

import errno
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from killed import (
    NO_MOUNT,
    completed,
    forked,
    killed_after,
    killed_at_event,
    on_small_disk,
    replaced,
)
from ppl_vae.core.errors import CheckpointError
from ppl_vae.core.files import write_atomically
from ppl_vae.inference.svi.fit import fit_svi
from ppl_vae.likelihoods import OptimalGaussian
from ppl_vae.models import PPCA, VAE, load, save
from ppl_vae.models.storage import CONFIG, WEIGHTS


def ppca(seed, data_dim=6):
    return PPCA(data_dim, 2, seed=seed)


def are_same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    same = ours.keys() == theirs.keys() and repr(first) == repr(second)
    return same and all(torch.equal(ours[name], theirs[name]) for name in ours)


def is_program(folder, program):
    """Whether the folder holds this program, whole."""
    return are_same(load(folder), program)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


OTHERS = {
    "same sizes": lambda: ppca(2),
    "other sizes": lambda: ppca(2, 7),
    "other class": lambda: VAE.mlp(5, 2, hidden=(4,), seed=1),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_kill_at_any_operation_leaves_the_old_program_or_the_new(make, tmp_path):
    old, new, found = ppca(1), make(), []
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        save(old, folder)
        killed = killed_at_event(lambda folder=folder: save(new, folder), number)
        found.append(is_program(folder, new))
        assert found[-1] or is_program(folder, old)
        if not killed:
            break
        save(new, folder)
        assert is_program(folder, new) and names(folder) == [CONFIG, WEIGHTS]
    # Kills fell before and after the moment at which the new program replaces the old one.
    assert sum(found) >= 2 and found.count(False) >= 2


def test_kills_in_succession_lose_nothing(tmp_path):
    """Each save starts from what the one before left."""
    save(ppca(0), tmp_path)
    expected = [ppca(0)]
    rng = random.Random(0)
    for seed in range(1, 16):
        program = ppca(seed)
        killed_at_event(lambda program=program: save(program, tmp_path), rng.randrange(1, 9))
        current = [p for p in (program, expected[-1]) if is_program(tmp_path, p)]
        assert current
        expected.append(current[0])


def test_a_kill_of_the_first_save_leaves_no_program_or_the_new_one(tmp_path):
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        if not killed_at_event(lambda folder=folder: save(ppca(1), folder), number):
            break
        try:
            assert is_program(folder, ppca(1))
        except FileNotFoundError:
            save(ppca(1), folder)
            assert is_program(folder, ppca(1))
    assert number > 3


@pytest.mark.slow
def test_random_kills(tmp_path):
    """100 kills at random moments of a process that saves two programs in turn."""
    programs = [VAE.mlp(400, 20, hidden=(300,), seed=seed) for seed in range(2)]
    save(programs[0], tmp_path)

    def saves():
        for number in itertools.count():
            save(programs[number % 2], tmp_path)

    rng, found = random.Random(0), [0, 0]
    for _ in range(100):
        assert killed_after(saves, rng.uniform(0.0, 0.2)) == -signal.SIGKILL
        current = [k for k in range(2) if is_program(tmp_path, programs[k])]
        assert len(current) == 1
        found[current[0]] += 1
    assert min(found) > 10


def limited(size, work):
    """Run in a child process that can write no file larger than this."""

    def inside():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(OSError) as caught:
            work()
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)

    return completed(inside)


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_leaves_the_old_program(size, tmp_path):
    save(old := ppca(1), tmp_path)
    new = VAE.mlp(60, 2, hidden=(40,), seed=1)
    assert limited(size, lambda: save(new, tmp_path)) == 0
    assert is_program(tmp_path, old) and names(tmp_path) == [CONFIG, WEIGHTS]


def test_a_small_disk_that_is_full_leaves_the_old_program(tmp_path):
    def work():
        save(old := ppca(1), tmp_path)
        for _ in range(3):
            with pytest.raises(OSError) as caught:
                save(VAE.mlp(300, 2, hidden=(100,), seed=1), tmp_path)
            assert caught.value.errno == errno.ENOSPC
            assert is_program(tmp_path, old) and names(tmp_path) == [CONFIG, WEIGHTS]
        save(ppca(2), tmp_path)
        assert is_program(tmp_path, ppca(2))

    status = on_small_disk(tmp_path, 2**16, work)
    if status == NO_MOUNT:
        pytest.skip("no file system can be mounted here")
    assert status == 0


def test_a_disk_that_is_full_for_the_configuration_alone_leaves_the_old_program(tmp_path):
    save(old := ppca(1), tmp_path)

    def hook(event, arguments):
        if event == "open" and ".config.json" in str(arguments[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    def save_new():
        sys.addaudithook(hook)
        save(ppca(2), tmp_path)

    assert limited(10**6, save_new) == 0
    assert is_program(tmp_path, old) and names(tmp_path) == [CONFIG, WEIGHTS]


def several(number, folder):
    """Programs, of which the first is saved in a folder, and what saves one there repeatedly."""
    programs = [ppca(seed, 5 + seed) for seed in range(number)]
    save(programs[0], folder)

    def saves(program):
        for _ in range(20):
            save(program, folder)

    return programs, saves


def check_whole(folder, programs):
    loaded = load(folder)
    assert any(are_same(loaded, program) for program in programs)


def check_one_won(folder, programs):
    assert sum(is_program(folder, program) for program in programs) == 1
    assert names(folder) == [CONFIG, WEIGHTS]


def test_of_two_writers_one_wins_whole(tmp_path):
    programs, saves = several(3, tmp_path)
    writers = [threading.Thread(target=saves, args=(program,)) for program in programs]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        check_whole(tmp_path, programs)
    for writer in writers:
        writer.join()
    check_one_won(tmp_path, programs)


def test_of_two_processes_one_wins_whole(tmp_path):
    programs, saves = several(2, tmp_path)
    running = {forked(partial(saves, program)) for program in programs}
    while running:
        check_whole(tmp_path, programs)
        for pid in [pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]]:
            running.remove(pid)
    check_one_won(tmp_path, programs)


def test_leftovers_of_killed_writers_are_removed_and_those_of_others_are_kept(tmp_path):
    path = tmp_path / "results.json"
    assert killed_at_event(lambda: write_atomically(path, b"x" * 10), 3)
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".results.json.")
    running = leftover.name.replace(leftover.name.split("-")[-2], str(os.getpid()))
    elsewhere = ".results.json.another-host-1-00000000.partial"
    for name in (running, elsewhere, ".results.json.txt", ".other.json.host-1-00000000.partial"):
        (tmp_path / name).touch()
    kept = set(names(tmp_path)) - {leftover.name}
    write_atomically(path, b"new")
    assert set(names(tmp_path)) == kept | {"results.json"}


# Hostile and damaged files


def edited(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WRONG = [None, True, 0, -1, 1e300, "", "a", [], [1], {}, {"a": 1}, {"a": "b"}, [[]]]


@pytest.mark.parametrize(
    "key", ["program", "constructor", "aliases", "frozen", "sha256", "format"]
)
def test_a_value_of_the_wrong_type_is_refused_by_the_name_of_the_file(key, tmp_path):
    save(program := ppca(1), tmp_path)
    text = (tmp_path / CONFIG).read_text()
    for wrong in WRONG:
        (tmp_path / CONFIG).write_text(text)
        if json.loads(text)[key] == wrong:
            continue
        edited(tmp_path, **{key: wrong})
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value)
    (tmp_path / CONFIG).write_text(text)
    assert is_program(tmp_path, program)


def nodes(value, path=()):
    """The path to every value inside a structure of JSON."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nodes(value[key], (*path, key))


PROGRAMS = {
    "vae": lambda: VAE.mlp(6, 2, hidden=(5,), seed=1),
    "ppca": lambda: ppca(1),
}


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_a_wrong_value_anywhere_in_the_constructor_is_refused_or_harmless(make, tmp_path):
    save(make(), tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    for path in nodes(content["constructor"]):
        for wrong in (*WRONG, 10**13, 10**30, [10**13], "PPCA"):
            edited(tmp_path, constructor=replaced(content["constructor"], path, wrong))
            try:
                loaded = load(tmp_path)
            except CheckpointError as error:
                assert str(tmp_path) in str(error)
            else:  # a setting that has no tensor of its own
                assert type(loaded).__name__ == content["program"]


TEXTS = {
    "empty": "",
    "no mapping": "[1, 2]",
    "deep": "[" * 100_000,
    "deep mappings": '{"a":' * 50_000,
    "no text": "\udcff",
    "number": "1e999",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_configuration_that_is_none_is_refused(text, tmp_path):
    save(ppca(1), tmp_path)
    (tmp_path / CONFIG).write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load(tmp_path)


def test_sizes_are_checked_against_the_file_before_memory_is_taken(tmp_path):
    save(ppca(1), tmp_path)
    size = 10**7  # 80 MB for each column of the loadings
    text = (tmp_path / CONFIG).read_text()
    for name, new in (("data_dim", size), ("latent_dim", size), ("data_dim", 10**13)):
        content = json.loads(text)
        content["constructor"]["arguments"][name] = new
        (tmp_path / CONFIG).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"config\.json .*AllocationError.*elements"):
            load(tmp_path)


def test_what_is_no_folder_of_a_program_is_refused(tmp_path):
    file = tmp_path / "x.pkl"
    file.write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"x\.pkl is a file; load takes the folder"):
        load(file)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*config\.json"):
        load(tmp_path)
    os.mkfifo(tmp_path / CONFIG)
    with pytest.raises(CheckpointError, match=r"config\.json is not a regular file"):
        load(tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(FileNotFoundError, match="loop"):
        load(loop)


def with_tensors(folder, change):
    """Replace the file of the tensors by another with a right checksum."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS)
    edited(folder, sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())


def test_tensors_of_another_kind_or_with_nan_are_refused(tmp_path):
    save(ppca(1), tmp_path / "a")
    with_tensors(tmp_path / "a", lambda tensors: {k: t.long() for k, t in tensors.items()})
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds integers in .*must be r"):
        load(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds integers"):
        load(tmp_path / "a", into=ppca(2))
    save(ppca(1), tmp_path / "b")
    with_tensors(tmp_path / "b", lambda tensors: {k: t / 0 * 0 for k, t in tensors.items()})
    with pytest.raises(CheckpointError, match=r"holds tensors with NaN: .*loadings"):
        load(tmp_path / "b")


def test_a_program_with_nan_is_not_saved_over_a_good_one(tmp_path):
    save(good := ppca(1), tmp_path)
    bad = ppca(2)
    with torch.no_grad():
        bad.loadings[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the program is not saved: .*loadings.* contain NaN"):
        save(bad, tmp_path)
    assert is_program(tmp_path, good)


def test_a_scale_that_is_not_frozen_yet_is_saved(tmp_path):
    vae = VAE.mlp(6, 2, likelihood=OptimalGaussian(), seed=1)
    loaded = load(save(vae, tmp_path))
    assert loaded.likelihood.scale.isnan()
    x = torch.randn(20, 6)
    fit_svi(loaded.model, loaded.guide, x, steps=3, seed=0, progress=False)
    assert is_program(save(loaded, tmp_path), loaded)


def test_any_flipped_byte_of_the_tensors_is_noticed_or_only_a_value(tmp_path):
    save(ppca(1), tmp_path)
    good, rng = (tmp_path / WEIGHTS).read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        data = bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        (tmp_path / WEIGHTS).write_bytes(data)
        edited(tmp_path, sha256=hashlib.sha256(data).hexdigest())
        try:
            assert load(tmp_path).loadings.shape == (6, 2)
        except CheckpointError as error:
            assert str(tmp_path) in str(error)


# What was saved


def test_mixed_dtypes_and_frozen_parameters_come_back(tmp_path):
    vae = VAE.mlp(6, 2, hidden=(5,), seed=1)
    vae.guide.encoder.double()
    vae.decoder.requires_grad_(False)
    loaded = load(save(vae, tmp_path))
    for name, tensor in vae.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
    assert len({tensor.dtype for tensor in loaded.state_dict().values()}) > 1
    frozen = {name: p.requires_grad for name, p in vae.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == frozen
    assert set(frozen.values()) == {True, False}
    into = load(tmp_path, into=VAE.mlp(6, 2, hidden=(5,), seed=2))
    assert {name: p.requires_grad for name, p in into.named_parameters()} == frozen


def test_loading_leaves_the_generators_as_they_were(tmp_path):
    save(ppca(1), tmp_path)
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
