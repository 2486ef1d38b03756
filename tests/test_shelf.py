import pytest
from buckets import Objects
from etils import epath

from flax_resnet import seals, storage
from flax_resnet.errors import UserError
from flax_resnet.shelf import Shelf


@pytest.fixture
def place(tmp_path):
    """Steps 1, 2 and 3 of top-1 0.5, 0.9 and none."""
    for step, top1 in ((1, 0.5), (2, 0.9), (3, None)):
        make(epath.Path(tmp_path / "c"), step, top1)
    return epath.Path(tmp_path / "c")


def make(place, step, top1=None):
    (place / str(step)).mkdir(parents=True)
    (place / str(step) / "x").write_text(f"x of {step}")
    seal = seals.take(place / str(step), top1 and {"top1": top1})
    seals.write(place / str(step), seal)


@pytest.fixture
def said():
    return []


@pytest.fixture
def shelf(place, said):
    opened = Shelf(place, said.append, None)
    yield opened
    opened.close()


def test_the_order_of_each_kind(shelf, place):
    kinds = ("latest", "best", "evaluated", 1, 7)
    assert [shelf.first(kind) for kind in kinds] == [3, 2, 2, 1, None]
    for step in (1, 2):
        seals.remove(place / str(step))
    assert [shelf.first(kind) for kind in kinds] == [3, None, 3, None, None]


def test_what_is_removed_while_it_is_chosen_is_not_spoken_of(shelf, place, said, monkeypatch):
    check = seals.problem

    def goes_on(directory, seal):
        """The run goes on: 4 is saved, and the three before it are removed."""
        monkeypatch.setattr(seals, "problem", check)
        make(place, 4)
        for step in (1, 2, 3):
            seals.remove(place / str(step))
        return seals.problem(directory, seal)

    monkeypatch.setattr(seals, "problem", goes_on)
    assert shelf.first("latest") == 4
    assert said == []


def test_each_is_spoken_of_once(shelf, place, said):
    (place / "3/x").write_text("y of 3")
    assert shelf.first("latest") == shelf.first("latest") == 2
    assert said == [
        f"checkpoint 3 in {place} is damaged (x has other bytes than were written): it is passed "
        "over"
    ]
    with pytest.raises(UserError, match=r"checkpoint 3 in .* is damaged"):
        shelf.first(3)


def test_keeping_and_clearing(shelf, place):
    make(place, 4, 0.1)
    shelf.prune(keep_last=1, keep_best=1)
    assert sorted(shelf.sealed()) == [2, 4]
    (place / "5").mkdir()
    (place / "6").mkdir()
    (place / "6" / seals.SEAL).write_text("?")
    (place / "7.orbax-checkpoint-tmp").mkdir()
    (place / "note").write_text("mine")
    shelf.open(resumed_from=2)
    names = ["2", "4.damaged", "6.damaged", "note"]
    assert sorted(path.name for path in place.iterdir()) == names


def test_what_a_failed_save_leaves_goes_and_what_is_sealed_stays(shelf, place):
    (place / "4.orbax-checkpoint-tmp/state").mkdir(parents=True)
    (place / "4").mkdir()
    for step in (3, 4):
        shelf.discard(step)
    assert sorted(path.name for path in place.iterdir()) == ["1", "2", "3"]


def test_a_bucket_that_does_not_answer_is_no_empty_one(bucket, said, monkeypatch):
    """Or a run would begin anew, or what is there be taken for unfinished and removed."""
    shelf = Shelf("s3://bucket/c", said.append, None)
    shelf.open(None)
    make_there = shelf.made / "1"
    make_there.mkdir()
    (make_there / "x").write_text("x")
    shelf.seal(1, None)
    assert shelf.first("latest") == 1
    before = dict(Objects.held)
    opens = Objects.open

    def fails(self, path, mode="r", **kwargs):
        if "w" in mode:
            return opens(self, path, mode, **kwargs)
        raise OSError("the network is down")

    monkeypatch.setattr(Objects, "open", fails)
    again = Shelf("s3://bucket/c", said.append, None)
    for ask in (lambda: again.first("latest"), lambda: again.open(None)):
        with pytest.raises(UserError, match=r"s3://bucket/c cannot be used \(OSError: the network"):
            ask()
    assert Objects.held == before
    again.close()
    shelf.close()


def test_copies_are_checked_and_removed(bucket, said, tmp_path):
    shelf = Shelf("s3://bucket/c", said.append, tmp_path / "staging")
    shelf.open(None)
    assert shelf.made == tmp_path / "staging"
    (shelf.made / "1").mkdir()
    (shelf.made / "1/x").write_text("x")
    shelf.seal(1, None)
    assert list(shelf.made.iterdir()) == []
    here = shelf.here(1)
    assert (here / "x").read_text() == "x"
    assert not storage.is_remote(here)
    shelf.close()
    assert not here.exists()
    Objects.held["bucket/c/1/x"] = b"y"
    other = Shelf("s3://bucket/c", said.append, None)
    with pytest.raises(OSError, match="x has other bytes"):
        other.here(1)
    with pytest.raises(FileNotFoundError, match="is not there"):
        other.here(2)
    other.close()
