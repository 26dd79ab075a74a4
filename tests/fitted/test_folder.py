"""The folder of a fitted model: what it gives back, damage, and kills at any moment."""

import itertools
import json
import os
import random
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import ppl_vae
from killed import completed, forked, killed_at_event
from ppl_vae.core.arrays.schema import TableSchema
from ppl_vae.data.files.tables import Table
from ppl_vae.fitted.fit import fit_table, split_rows
from ppl_vae.fitted.folder import (
    CARD,
    METADATA,
    RUN,
    digest_program,
    load_fitted,
    save_fitted,
)
from ppl_vae.fitted.model import FittedModel
from ppl_vae.fitted.settings import FitSettings, Run
from ppl_vae.models.storage import CONFIG


def table(columns=("a", "b", "c", "d"), num_rows=30, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, 2)) @ rng.normal(size=(2, len(columns)))
    x += 0.3 * rng.normal(size=x.shape)
    return Table("x.csv", x * 10.0 ** np.arange(len(columns)), tuple(columns))


@pytest.fixture(scope="module")
def fitted():
    return fit_table(table(), FitSettings(latent_dim=1))


def test_a_folder_gives_back_what_was_saved(fitted, tmp_path):
    save_fitted(fitted, tmp_path)
    found = load_fitted(tmp_path)
    assert digest_program(found.program) == digest_program(fitted.program)
    before, after = fitted.metadata.to_dict(), found.metadata.to_dict()
    assert before | {"program_digest": ""} == after | {"program_digest": ""}
    values = table(seed=1).values
    for name in ("reconstruct", "sample"):
        argument = values if name == "reconstruct" else 3
        torch.testing.assert_close(
            getattr(found, name)(argument), getattr(fitted, name)(argument), rtol=0, atol=0
        )
    assert (tmp_path / CARD).read_text().startswith("# Probabilistic PCA of x.csv with K = 1")


def test_a_table_in_the_place_of_a_model_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x\.csv is a file; a model is the folder that ppl-vae"):
        load_fitted(path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_fitted(tmp_path / "nothing")


def test_a_folder_that_save_changed_later_is_refused(fitted, tmp_path):
    save_fitted(fitted, tmp_path)
    ppl_vae.save(ppl_vae.PPCA(4, 2, seed=0), tmp_path)
    with pytest.raises(ValueError, match="describes another model than the one in the folder"):
        load_fitted(tmp_path)
    (tmp_path / METADATA).unlink()
    assert load_fitted(tmp_path).metadata is None


def damaged(content, rng):
    """The content of fit.json with one entry replaced."""
    path, place = [], content
    while isinstance(place, dict) and place and (not path or rng.random() < 0.5):
        path.append(rng.choice(sorted(place)))
        place = place[path[-1]]
    target = content
    for key in path[:-1]:
        target = target[key]
    if rng.random() < 0.3:
        del target[path[-1]]
    else:
        target[path[-1]] = rng.choice([None, 7, "text", [], {}, [[1.0]], -1e300, True])
    return content


def resealed(content):
    """The text of fit.json with the right checksum."""
    content.pop("checksum", None)
    text = json.dumps(content, ensure_ascii=False)
    return json.dumps(content | {"checksum": sha256(text.encode()).hexdigest()})


def test_damage_is_a_value_error_with_the_name_of_the_file(fitted, tmp_path):
    save_fitted(fitted, tmp_path)
    text, rng = (tmp_path / METADATA).read_text(), random.Random(0)
    assert json.loads(resealed(json.loads(text))) == json.loads(text)
    refused = 0
    for _ in range(200):
        (tmp_path / METADATA).write_text(resealed(damaged(json.loads(text), rng)))
        try:
            model = load_fitted(tmp_path)
        except ValueError as error:
            assert METADATA in str(error)
            refused += 1
        else:
            assert model.log_likelihood(table().values).value.isfinite().all()
    assert refused > 20
    other = text.replace("0.", "1.", 1)
    (tmp_path / METADATA).write_text(other)
    with pytest.raises(ValueError, match=r"fit\.json is damaged: its content is not what was"):
        load_fitted(tmp_path)
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        (tmp_path / METADATA).write_text(text[:cut])
        with pytest.raises(ValueError, match="is damaged"):
            load_fitted(tmp_path)


@pytest.fixture(scope="module")
def other():
    return fit_table(table(seed=5), FitSettings(latent_dim=2))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(fitted, other, tmp_path):
    """Two models and the content of their folders."""
    contents = []
    for number, model in enumerate((fitted, other)):
        save_fitted(model, tmp_path / f"saved {number}")
        contents.append(files_of(tmp_path / f"saved {number}"))
    return (fitted, other), contents


def whole_place(folder, models, contents):
    """Which of these models a folder holds when it has been read, with all files."""
    model = load_fitted(folder)
    digests = [digest_program(other.program) for other in models]
    place = digests.index(digest_program(model.program))
    assert model.metadata.settings["latent_dim"] == place + 1
    found = files_of(folder)
    assert all(found[name] == contents[place][name] for name in (CARD, RUN, METADATA, CONFIG))
    # What a killed process was writing has names of its own, which the next save removes.
    others = found.keys() - contents[0].keys()
    assert all(".new." in n or n.endswith(".partial") or n.startswith("model-") for n in others)
    return place


def test_a_kill_leaves_the_old_model_or_the_new_one(saved, tmp_path):
    (old, new), contents = saved
    found = []
    for number in itertools.count(1):
        out = tmp_path / str(number)
        save_fitted(old, out)
        killed = killed_at_event(lambda out=out: save_fitted(new, out), number)
        found.append(whole_place(out, *saved))
        save_fitted(old, out)
        assert files_of(out) == contents[0]
        shutil.rmtree(out)
        if not killed:
            break
    assert found[-1] == 1 and found[0] == 0 and len(found) > 8


def test_a_file_of_someone_else_is_kept(saved, tmp_path):
    save_fitted(saved[0][0], tmp_path / "m")
    (tmp_path / "m" / "mine.txt").write_text("kept")
    save_fitted(saved[0][1], tmp_path / "m")
    assert files_of(tmp_path / "m") == saved[1][1] | {"mine.txt": b"kept"}


def test_kills_in_succession_lose_nothing(saved, tmp_path):
    models, _ = saved
    out, rng, places = tmp_path / "m", random.Random(0), []
    save_fitted(models[0], out)
    for number in range(25):
        killed_at_event(lambda k=number % 2: save_fitted(models[k], out), rng.randrange(1, 24))
        if rng.random() < 0.5:
            places.append(whole_place(out, *saved))
    assert len({*places}) == 2


def test_a_failure_while_saving_leaves_the_old_model(saved, tmp_path, monkeypatch):
    (old, new), contents = saved
    save_fitted(old, tmp_path / "m")
    for failing in ("save", "write_atomically"):
        with monkeypatch.context() as patch:

            def fail(*arguments):
                raise OSError("No space left on device")

            patch.setattr(f"ppl_vae.fitted.folder.{failing}", fail)
            with pytest.raises(OSError, match="No space left"):
                save_fitted(new, tmp_path / "m")
        assert files_of(tmp_path / "m") == contents[0]


def test_a_folder_that_cannot_be_written_is_read_between_two_states(saved, tmp_path, monkeypatch):
    (old, new), _ = saved
    out = tmp_path / "m"
    save_fitted(old, out)
    with monkeypatch.context() as patch:

        def fail(folder):
            raise OSError("Read-only file system")

        patch.setattr("ppl_vae.fitted.folder._rename_new", fail)
        killed = completed(lambda: save_fitted(new, out))
        assert killed and load_fitted(out).metadata.settings["latent_dim"] == 2
    assert whole_place(out, *saved) == 1


@pytest.mark.slow
def test_a_reader_beside_a_writer_finds_one_of_the_models(saved, tmp_path):
    models, out = saved[0], tmp_path / "m"
    save_fitted(models[0], out)

    def write():
        for number in range(300):
            save_fitted(models[number % 2], out)

    pid, found = forked(write), []
    while not os.waitpid(pid, os.WNOHANG)[0]:
        model = load_fitted(out)
        assert model.metadata.settings["latent_dim"] == model.latent_dim
        found.append(model.latent_dim)
    assert len({*found}) == 2


def model_of(columns, names=None):
    """A model of this number of columns, with the schema of a frame if names are given."""
    program = ppl_vae.PPCA(len(columns), 1, seed=0)
    program.schema = None if names is None else TableSchema(tuple(names), "pandas")
    return FittedModel(program, name="m")


def test_columns_are_matched():
    values = table().values
    given = Table("t", values, ("d", "c", "b", "a"))
    assert np.array_equal(model_of("abcd", "abcd").match(given), values[:, ::-1])
    with pytest.warns(UserWarning, match="left out: 'd', 'b'"):
        found = model_of("ca", "ca").match(given)
    assert np.array_equal(found, values[:, [1, 3]])
    unnamed = Table("t", values, ("x1", "x2", "x3", "x4"), has_names=False)
    assert np.array_equal(model_of("abcd", "abcd").match(unnamed), values)
    numbered = model_of("abcd", range(4))
    assert np.array_equal(numbered.match(given), values)
    with pytest.raises(ValueError, match=r"lacks 1 of the 2 columns .* fitted to: 'e'; it has"):
        model_of("ae", "ae").match(given)
    with pytest.raises(ValueError, match="t has 4 columns, and the model in m has 3"):
        model_of("abc").match(given)


def test_a_header_named_like_numbered_columns_is_matched_by_name(fitted):
    x = table(("x2", "x1", "x3"))
    named = fit_table(x, FitSettings(latent_dim=1))
    later = Table("t", x.values[:, [1, 0, 2]], ("x1", "x2", "x3"))
    assert np.array_equal(named.match(later), x.values)
    unnamed = fit_table(replace(x, has_names=False), FitSettings(latent_dim=1))
    assert unnamed.schema is None and np.array_equal(unnamed.match(later), later.values)


def test_rows_are_split_without_overlap():
    for model, num_val in (("ppca", 0), ("vae", 3)):
        rows = split_rows(np.arange(0, 80, 2), FitSettings(model=model, seed=3))
        assert [*map(len, rows)] == [32 - num_val, num_val, 8]
        assert sorted(np.concatenate(rows)) == [*range(0, 80, 2)]
    everything = split_rows(np.arange(5), FitSettings(held_out=0.0))
    assert everything.train.tolist() == [*range(5)] and len(everything.held_out) == 0
    with pytest.raises(
        ValueError, match="4 rows with observed values, 2 of them held out: too few"
    ):
        split_rows(np.arange(4), FitSettings())


def test_run_configurations_are_read_as_they_were_written(tmp_path):
    run = Run(
        'C:\\tabs\t"ä" \x7f 🐟.csv',
        {"label": "a,b", "header": False, "skip_rows": 3},
        FitSettings(hidden=(4, 5), epochs=None, learning_rate=1e-3).to_plain(),
        "0f",
    )
    (tmp_path / "run.toml").write_text(run.to_toml(), encoding="utf-8")
    found = Run.read(tmp_path / "run.toml")
    assert found == run
    assert FitSettings.from_plain(found.settings, "x") == FitSettings(hidden=(4, 5))


def test_a_program_without_a_record_is_in_its_own_units():
    ppca = ppl_vae.PPCA.like(table().values, 1, seed=0)
    model = FittedModel(ppca)
    found = model.log_likelihood(table().values).value
    torch.testing.assert_close(found, ppca.log_likelihood(table().values).detach())
    assert model.columns == ("x1", "x2", "x3", "x4")
    with pytest.raises(ValueError, match="there is no metadata of the fit"):
        save_fitted(model, Path("nowhere"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"seed": 2**32}, "--seed must be a whole number within"),
        ({"model": "pca"}, "--model must be one of"),
        ({"learning_rate": float("nan")}, "--learning-rate must be finite and above 0; got nan"),
        ({"learning_rate": float("inf")}, "--learning-rate must be finite and above 0; got inf"),
        ({"held_out": 1.0}, "--held-out must be between 0 and 1"),
        ({"epochs": 0}, "--epochs must be a whole number >= 1; got 0"),
        ({"scale": "log"}, "--scale must be one of"),
    ],
)
def test_settings_are_checked(argument, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**argument)
