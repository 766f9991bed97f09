"""A process that ends at any of its calls of the file system leaves the old thing or the new one,
and whatever comes next goes on.

Each writer runs again and again in a child process, which ends before its first call of the file
system, before its second... until it gets through: killed, when nothing is cleaned up; or on a full
disk, when a call fails and the writer goes its own way.
"""

import io
import itertools
import json
import os
import resource
import shutil
import sys
import time

import pytest
import torch
import yaml
from conftest import make_tokenizer
from test_resume import begin
from test_train import project  # noqa: F401  (a fixture)
from tiny import example_of, native_rows, save_model, write_rows

from mpo.config import load_config
from mpo.models.forward import SequenceScores
from mpo.models.scoring import Measurement
from mpo.runtime.errors import UserError
from mpo.runtime.files import new_folder, remove_incomplete, write_json
from mpo.training import checkpoint, checkpoint_folder, reference
from mpo.training.reference import ReferenceStore
from mpo.training.run_folder import OutputFolder, read_metrics

KILLED, REFUSED, DONE_ANYWAY, WRONG = 9, 3, 4, 5
CALLS = {
    "open",
    "replace",
    "rename",
    "mkdir",
    "unlink",
    "remove",
    "rmdir",
    "fsync",
    "write",
    "ftruncate",
    "link",
    "symlink",
}
OF_FILES = {"write", "writelines", "flush", "truncate", "close"}


def changes_a_file(call):
    """Whether a built-in function changes, or may change, what is on the disk."""
    name, owner = call.__name__, getattr(call, "__self__", None)
    if isinstance(owner, io.IOBase):
        return name in OF_FILES
    return name in ("serialize_file", "_save") or (
        name in CALLS and call.__module__ in ("posix", "_io", "io")
    )


def in_a_child(work, place, how):
    """Runs `work` in a child whose `place`-th call of the file system ends it.

    Returns KILLED, REFUSED (a UserError), DONE_ANYWAY (a call failed that does not matter), or 0
    where there are fewer calls.
    """
    child = os.fork()
    if child == 0:
        seen = itertools.count(1)

        def end(frame, event, call):
            if event == "c_call" and changes_a_file(call) and next(seen) == place:
                if how == "killed":
                    os._exit(KILLED)
                raise OSError(28, "No space left on device")

        status = WRONG
        try:
            sys.setprofile(end)
            work()
            sys.setprofile(None)
            status = 0 if next(seen) <= place else DONE_ANYWAY
        except UserError as error:
            status = (
                REFUSED
                if "cannot be written" in str(error) or "cannot be read" in str(error)
                else WRONG
            )
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def every_end(tmp_path, how, prepare, work, check):
    """Ends `work` everywhere. `prepare(folder)` comes before it, `check(folder, done)` behind it.
    Returns the number of places."""
    for place in itertools.count(1):
        folder = tmp_path / str(place)
        folder.mkdir()
        prepare(folder)
        status = in_a_child(lambda folder=folder: work(folder), place, how)
        assert status == 0 or (
            status == KILLED if how == "killed" else status in (REFUSED, DONE_ANYWAY)
        ), f"place {place}: {status}"
        check(folder, status in (0, DONE_ANYWAY))
        shutil.rmtree(folder)
        if status == 0:
            return place - 1


def junk(folder):
    return [path.name for path in folder.rglob("*.incomplete")]


both = pytest.mark.parametrize("how", ["killed", "full disk"])


@both
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, how):
    old, new = {"a": 1}, {"b": list(range(5000))}  # larger than a buffer

    def check(folder, done):
        found = json.loads((folder / "x.json").read_text())
        assert found == new if done else found in (old, new)
        assert how == "killed" or not junk(folder)
        write_json(folder / "x.json", old)
        remove_incomplete(folder)
        assert [path.name for path in folder.iterdir()] == ["x.json"]

    places = every_end(
        tmp_path,
        how,
        lambda f: write_json(f / "x.json", old),
        lambda f: write_json(f / "x.json", new),
        check,
    )
    assert places >= 5  # the tests notices if the calls are no longer seen


@both
@pytest.mark.parametrize("there_is_one", [False, True], ids=["new", "replaced"])
def test_a_folder_is_the_old_one_or_the_new_one_never_a_part(tmp_path, how, there_is_one):
    def write(folder, mark):
        with new_folder(folder / "x") as temporary:
            for name in "abc":
                (temporary / name).write_text(mark)

    def contents(folder):
        return (
            {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None
        )

    old, new = dict.fromkeys("abc", "old") if there_is_one else None, dict.fromkeys("abc", "new")

    def check(folder, done):
        found = contents(folder / "x")
        assert found == new if done else found in (old, new, None)
        # between the two renames: then it lies beside its place, whole
        if there_is_one and found is None:
            assert how == "killed" and old in [contents(folder / name) for name in junk(folder)]
        assert how == "killed" or done or not junk(folder)
        write(folder, "newer")
        remove_incomplete(folder)
        assert [path.name for path in folder.iterdir()] == ["x"] and contents(
            folder / "x"
        ) == dict.fromkeys("abc", "newer")

    places = every_end(
        tmp_path,
        how,
        lambda f: write(f, "old") if there_is_one else None,
        lambda f: write(f, "new"),
        check,
    )
    assert places >= 8


def example(i):
    from mpo.data.examples import TokenizedResponse

    return example_of(
        f"rows:{i}", "sw", *(TokenizedResponse((1, 2, 3 + i, 4 + k), 2) for k in range(4))
    )


@both
def test_a_store_is_there_whole_or_not_at_all(tmp_path, how):
    scores = SequenceScores(torch.arange(2.0), torch.ones(2, 3))
    store = ReferenceStore({}, scores)

    def check(folder, done):
        found = ReferenceStore.load(folder / "store", {"weights": "a"}, list(example(0).dominant))
        assert (
            found is not None
            if done
            else found is None or torch.equal(found.scores.pooled, scores.pooled)
        )

    every_end(
        tmp_path,
        how,
        lambda f: None,
        lambda f: store.save(f / "store", {"weights": "a"}),
        check,
    )


@both
def test_parts_of_a_store_are_whole_or_not_there(tmp_path, how):
    manifest, scores = {"weights": "a"}, SequenceScores(torch.arange(2.0), torch.ones(2, 3))

    def prepare(folder):
        parts = reference.Parts(folder / ".store.parts", manifest)
        assert parts.finished([2, 2]) == {}
        parts.keep(0, scores)

    def check(folder, done):
        found = reference.Parts(folder / ".store.parts", manifest).finished([2, 2])
        assert set(found) == {0, 1} if done else set(found) in ({0}, {0, 1})
        assert all(
            torch.equal(part.mean_logp, scores.mean_logp) for part in found.values()
        ) and not junk(folder)

    every_end(
        tmp_path,
        how,
        prepare,
        lambda f: reference.Parts(f / ".store.parts", manifest).keep(1, scores),
        check,
    )

    def again(folder, done):
        parts = reference.Parts(folder / ".store.parts", {"weights": "b"})
        assert parts.finished([2, 2]) == {}

    work = lambda f: reference.Parts(f / ".store.parts", {"weights": "b"}).finished([2, 2])  # noqa: E731
    every_end(tmp_path, how, prepare, work, again)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("atomic")
    save_model(root / "model", make_tokenizer())
    write_rows(root / "train.jsonl", native_rows(dominants=1))
    (root / "run.yaml").write_text(
        yaml.safe_dump(
            {"output_dir": "x", "model": {"path": "model"}, "data": {"train": ["train.jsonl"]}}
        )
    )
    return load_config(root / "run.yaml", ["data.date=2026-03-02"])


@both
def test_a_run_that_never_got_to_begin_is_begun_again(tmp_path, how, config):
    def check(folder, done):
        run = OutputFolder(folder / "run")
        assert run.open(config, "rows", {}, 1) in ([True] if done else [True, False])
        assert run.read()["rows"] == "rows" and not junk(folder)

    every_end(
        tmp_path,
        how,
        lambda f: None,
        lambda f: OutputFolder(f / "run").open(config, "rows", {}, 1),
        check,
    )


@both
def test_gaps_before_are_whole_or_measured_again(tmp_path, how):
    gaps = Measurement(torch.arange(2.0), torch.ones(2), torch.ones(2, 2, 3))

    def check(folder, done):
        found = Measurement.load(folder / "gaps_before", 2)
        assert (
            found is not None if done else found is None or torch.equal(found.target, gaps.target)
        )

    every_end(tmp_path, how, lambda f: None, lambda f: gaps.save(f / "gaps_before"), check)


def row(step):
    return {"step": step, "gap": {"sw": 0.5}, "loss": 1 / step}


def lines(folder, steps):
    for step in range(1, steps + 1):
        assert OutputFolder(folder).append_metrics(row(step)) is None


def test_a_line_of_metrics_is_whole_or_left_out(tmp_path, config):
    def check(folder, done):
        found = read_metrics(folder / "metrics.jsonl")
        assert found == [row(1), row(2), row(3)][: len(found)] and len(found) in (
            [3] if done else [2, 3]
        )

    assert (
        every_end(tmp_path, "killed", lambda f: lines(f, 2), lambda f: lines_from(f, 3), check) >= 3
    )


def lines_from(folder, step):
    assert OutputFolder(folder).append_metrics(row(step)) is None


@both
def test_metrics_are_cut_in_one_piece(tmp_path, how, config):
    def prepare(folder):
        OutputFolder(folder).open(config, "rows", {}, 1)
        lines(folder, 5)

    def check(folder, done):
        assert read_metrics(folder / "metrics.jsonl") in (
            [[row(1), row(2), row(3)]]
            if done
            else [[row(i) for i in range(1, n + 1)] for n in (3, 5)]
        )

    every_end(tmp_path, how, prepare, lambda f: OutputFolder(f).truncate_metrics(3), check)


def test_a_disk_that_is_full_for_a_while_costs_no_line_of_metrics(tmp_path):
    """A file that may not grow beyond some size, which is where a line ends half way, then may."""
    first = len(json.dumps(row(1))) + 1
    for room in (0, 1, first // 2, first - 1):
        folder = tmp_path / str(room)
        folder.mkdir()
        lines(folder, 1)
        run = OutputFolder(folder)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (first + room, limits[1]))
        try:
            assert "cannot be written" in run.append_metrics(
                row(2)
            ) and "2 line(s) wait" in run.append_metrics(row(3))
            assert read_metrics(folder / "metrics.jsonl") == [row(1)]
            # nothing half is left that a line would be written behind
            assert (folder / "metrics.jsonl").stat().st_size == first
            with pytest.raises(UserError, match=r"metrics.jsonl cannot be written"):
                run.flush_metrics()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert run.append_metrics(row(4)) is None
        assert read_metrics(folder / "metrics.jsonl") == [row(1), row(2), row(3), row(4)]


class Writer:
    """As DeepSpeed's: a method of its class, which an attribute may hide for a while."""

    def __init__(self, write):
        self.write = write

    def save(self, state, path):
        self.write(state, path)


class Engine:
    """Writes the files that DeepSpeed would, through the same object."""

    def __init__(self, mark="new", fails=None):
        self.module = torch.nn.Linear(1, 1)
        self.checkpoint_engine = Writer(self.write)
        self._mark, self._fails = mark, fails

    def write(self, state, path):
        if self._fails and self._fails[0] in path:
            raise self._fails[1]
        with open(path, "w") as file:
            file.write(state)

    def _copy_recovery_script(self, folder):
        raise AssertionError("not needed")

    def save_checkpoint(self, folder, tag, **_):
        for name in ("model_states.pt", "optim_states.pt"):
            self.checkpoint_engine.save(f"{self._mark} {name}", f"{folder}/{tag}/{name}")
        self._copy_recovery_script(folder)


@pytest.fixture
def one_rank(monkeypatch):
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 1)


def save(folder, step, keep=2, **engine):
    return checkpoint.save(Engine(**engine), folder / "checkpoints", step, 2, keep)


def steps_in(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def is_whole(found, mark):
    return {p.name: p.read_text() for p in found.folder.glob("*.pt")} == {
        n: f"{mark} {n}" for n in ("model_states.pt", "optim_states.pt")
    }


@pytest.mark.parametrize(("how", "keep"), [("killed", 1), ("full disk", 2)])
def test_a_checkpoint_is_whole_or_not_there(tmp_path, how, keep, one_rank):
    """The newest is the old one or the new one, and the next save leaves just what is to be
    kept."""

    def prepare(folder):
        assert save(folder, 1, mark="first") is None and save(folder, 2, mark="second") is None

    def work(folder):
        failure = save(folder, 3, keep, mark="third")
        if failure is not None:
            assert "could not be written" in failure and "The newest one is step-0000000" in failure
            raise UserError("cannot be written")

    def check(folder, done):
        found = checkpoint_folder.newest(folder / "checkpoints", pytest.fail)
        assert found.step == 3 if done else found.step in (2, 3)
        assert is_whole(found, "third" if found.step == 3 else "second")
        assert how == "killed" or found.step == 3 or not junk(folder)
        assert save(folder, 4, keep, mark="fourth") is None
        assert checkpoint_folder.newest(folder / "checkpoints", pytest.fail).step == 4
        assert len(steps_in(folder)) == keep and not junk(folder)

    assert every_end(tmp_path, how, prepare, work, check) >= 10


@pytest.mark.parametrize("name", ["model_states", "optim_states"])
def test_an_end_within_deepspeed_leaves_the_older_checkpoint(tmp_path, one_rank, name):
    assert save(tmp_path, 1) is None
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, fails=(name, KeyboardInterrupt()))
    assert checkpoint_folder.newest(tmp_path / "checkpoints", pytest.fail).step == 1
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002.incomplete"]
    engine = Engine(fails=(name, OSError(28, "No space left on device")))
    failure = checkpoint.save(engine, tmp_path / "checkpoints", 3, 2, 2)
    assert (
        "No space left" in failure
        and "The newest one is step-00000001" in failure
        and steps_in(tmp_path) == ["step-00000001"]
    )
    # the engine is as it was
    assert not set(vars(engine.checkpoint_engine)) - {"write"}
    assert "_copy_recovery_script" not in vars(engine)
    assert "No space left" in save(
        tmp_path, 3, fails=(name, RuntimeError("[enforce fail] No space left on device"))
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_costs_the_checkpoint_on_all(tmp_path, one_rank, monkeypatch, rank):
    """What each rank could not write, and which files each has written, are known to the one that
    publishes."""
    assert save(tmp_path, 1) is None
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoint.dist, "broadcast_object_list", lambda outcome, src: None)
    fails = [["No space left on device"] if rank == r else [] for r in range(2)]

    def gather(everyone, mine):
        is_of_files = isinstance(mine, dict)
        other = {"rank1_optim_states.pt": 6} if is_of_files else (fails[1] or [None])[0]
        everyone[:] = [mine if is_of_files else (fails[0] or [mine])[0], other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    failure = save(tmp_path, 2)
    assert "No space left on device" in failure and steps_in(tmp_path) == ["step-00000001"]
    fails[rank] = []
    assert save(tmp_path, 2) is None
    state = json.loads((tmp_path / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["world_size"] == 2 and set(state["files"]) == {
        "model_states.pt",
        "optim_states.pt",
        "rank1_optim_states.pt",
    }
    said = []
    # the file of the other rank is not there
    assert checkpoint_folder.newest(tmp_path / "checkpoints", said.append).step == 1
    assert "rank1_optim_states.pt is missing" in said[0]


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path, one_rank):
    """The run goes on from step 2, because 9 is damaged; what it writes after step 3 is the newest,
    and 9 goes."""
    assert save(tmp_path, 2) is None and save(tmp_path, 9) is None
    (tmp_path / "checkpoints" / "step-00000009" / "model_states.pt").write_text("half")
    (tmp_path / "checkpoints" / "step-00000009.portable").mkdir()
    said = []
    assert (
        checkpoint_folder.newest(tmp_path / "checkpoints", said.append).step == 2
        and "model_states.pt has 4 bytes" in said[0]
    )
    assert save(tmp_path, 3, keep=1) is None
    assert steps_in(tmp_path) == ["step-00000003"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_real_ranks_of_which_one_has_a_full_disk(project, stage):  # noqa: F811
    """From some step on no file of rank 1 may grow beyond 20 kB. Both go through the collectives
    together and train on."""
    out = project / f"one-full-{stage}"
    options = [
        f"zero.stage={stage}",
        "checkpoint.every=2",
        "checkpoint.export=false",
        "train.max_steps=60",
    ]
    options += (
        ["zero.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"]
        if stage == 3
        else []
    )
    ranks = begin(project, out, options, 2)
    while not (out / "metrics.jsonl").exists() and ranks[1].poll() is None:
        time.sleep(0.01)
    resource.prlimit(ranks[1].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert [process.wait(240) for process in ranks] == [0, 0]
    text = out.with_name(f"{out.name}-rank0.log").read_text()
    assert "The checkpoint after step 60 could not be written" in text, text[-3000:]
    assert len(read_metrics(out / "metrics.jsonl")) == 60 and not list(
        (out / "checkpoints").glob("*.incomplete")
    )
    found = checkpoint_folder.newest(out / "checkpoints", pytest.fail)
    assert found is None or found.step < 60
