"""What a user names is what is found, in a fixed order, under names that never meet."""

import io
import os
from pathlib import Path

import pytest

from diffcam_fast.images.inputs import Source, find_images
from diffcam_fast.images.read import ImageError, read_image


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(sources: list[Source]) -> list[str]:
    return [source.name for source in sources]


def paths(sources: list[Source]) -> list[str]:
    return [source.path.as_posix() for source in sources]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folder_is_searched_in_order_for_images_only(here):
    touch(here, "p/b.JPG", "p/a.png", "p/notes.txt", "p/sub/z.webp", "p/sub/.hidden.png", "p/a2")
    found = find_images(["p"])
    assert paths(found) == ["p/a.png", "p/b.JPG", "p/sub/z.webp"]
    assert names(found) == ["a", "b", "sub/z"]


def test_a_file_may_be_called_anything(here):
    touch(here, "cat", "dog.data")
    assert names(find_images(["cat", "dog.data"])) == ["cat", "dog"]


def test_single_files_share_their_folder(here):
    touch(here, "a/cat.jpg", "b/c/cat.jpg")
    assert names(find_images(["a/cat.jpg"])) == ["cat"]
    assert names(find_images(["a/cat.jpg", "b/c/cat.jpg"])) == ["a/cat", "b/c/cat"]


def test_order_of_arguments_stays(here):
    touch(here, "z.jpg", "a.jpg")
    assert paths(find_images(["z.jpg", "a.jpg"])) == ["z.jpg", "a.jpg"]


def test_each_file_once(here):
    touch(here, "p/a.jpg")
    found = find_images(["p/a.jpg", "p", "./p/../p/a.jpg", str(here / "p"), "p/*.jpg"])
    assert paths(found) == ["p/a.jpg"]


def test_same_stem_keeps_the_suffix(here):
    touch(here, "p/cat.jpg", "p/cat.png", "p/dog.jpg")
    assert names(find_images(["p"])) == ["cat.jpg", "cat.png", "dog"]


def test_same_name_in_two_folders(here):
    touch(here, "a/cat.jpg", "b/cat.jpg", "b/dog.jpg")
    found = names(find_images(["a", "b"]))
    assert found[2] == "dog"
    assert len({*found}) == 3
    assert all(name.startswith("cat.jpg-") and len(name) == 16 for name in found[:2])
    # The name of a file does not hang on the order, so that a resumed run finds it again.
    assert set(names(find_images(["b", "a"]))) == set(found)


def test_names_that_meet_on_other_systems(here):
    touch(here, "p/Cat.jpg", "p/cat.png")
    assert names(find_images(["p"])) == ["Cat.jpg", "cat.png"]
    touch(here, "q/caf\u00e9.jpg", "q/cafe\u0301.png")
    assert len({name.casefold() for name in names(find_images(["q"]))}) == 2
    assert all("." in name for name in names(find_images(["q"])))


def test_glob(here):
    touch(here, "p/a.jpg", "p/sub/b.jpg", "p/sub/deep/c.jpg", "q/d.jpg", "p/x.png")
    assert names(find_images(["p/*.jpg"])) == ["a"]
    assert names(find_images(["p/**/*.jpg"])) == ["a", "sub/b", "sub/deep/c"]
    assert names(find_images(["?/*.jpg"])) == ["p/a", "q/d"]
    assert names(find_images(["*"])) == ["p/a", "p/x", "p/sub/b", "p/sub/deep/c", "q/d"]
    assert names(find_images([str(here / "q" / "*")])) == ["d"]


def test_name_with_brackets_is_no_glob(here):
    touch(here, "cat[1].jpg")
    assert paths(find_images(["cat[1].jpg"])) == ["cat[1].jpg"]


def test_text_list_and_stdin(here):
    touch(here, "a.jpg", "p/b.jpg", "with space .jpg", "-")
    (here / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n\r\nwith space .jpg\ngone.jpg\n")
    found = find_images([], text_list="list.txt", stdin=io.StringIO("p\n\na.jpg\n"))
    assert paths(found) == ["a.jpg", "with space .jpg", "gone.jpg", "p/b.jpg"]
    assert names(found) == ["a", "with space", "gone", "b"]
    assert paths(find_images(["-"], stdin=io.StringIO("a.jpg"))) == ["a.jpg"]
    assert find_images([], stdin=io.StringIO("")) == []


def test_excluded_folder(here):
    touch(here, "a.jpg", "out/a.overlay.png", "out/sub/b.png")
    assert paths(find_images(["."], exclude="out")) == ["a.jpg"]
    assert paths(find_images(["**/*.*"], exclude=here / "out")) == ["a.jpg"]


def test_the_output_folder_may_be_where_the_images_are(here):
    touch(here, "p/a.jpg", "p/out/b.jpg", "p/out/sub/c.jpg", "d.jpg")
    assert names(find_images(["p"], exclude="p")) == ["a", "out/b", "out/sub/c"]
    assert names(find_images(["p/*.jpg"], exclude=".")) == ["a"]
    assert names(find_images(["p/*"], exclude=".")) == ["a", "out/b", "out/sub/c"]
    assert names(find_images(["p/out"], exclude="p")) == ["b", "sub/c"]
    assert names(find_images([], stdin=io.StringIO("p\n"), exclude="p")) == names(
        find_images(["p"])
    )
    # Strictly below the folder that is searched it is left out, whatever a glob matches in it.
    assert names(find_images(["p/*"], exclude="p/out")) == ["a"]
    assert names(find_images(["**"], exclude="p/out")) == ["d", "p/a"]


def test_a_glob_takes_no_tables_from_the_output_folder(here):
    touch(here, "p/a.jpg", "p/photo", "p/ledger.jsonl", "p/maps.parquet", "p/a.npz", "q/unnamed")
    for pattern, outputs in (("p/*", "p"), ("p/**", "p"), ("[p]/*", ".")):
        assert paths(find_images([pattern], exclude=outputs)) == ["p/a.jpg"]
    # Elsewhere, and where it is named, a file may be called anything.
    assert paths(find_images(["q/*"], exclude="p")) == ["q/unnamed"]
    assert paths(find_images(["p/photo"], exclude="p")) == ["p/photo"]


def test_pictures_of_an_earlier_run_are_no_images(here):
    touch(here, "p/cat.png", "p/cat.overlay.png", "p/cat.heatmap.png", "p/sub/dog.cat.overlay.png")
    assert paths(find_images(["p"])) == ["p/cat.png"]
    assert paths(find_images(["p/**/*.png"])) == ["p/cat.png"]
    with pytest.raises(ValueError, match=r"holds no image .*; overlays .* are left out"):
        find_images(["p/sub"])
    # Who names one means it.
    assert paths(find_images(["p/cat.overlay.png"])) == ["p/cat.overlay.png"]
    assert paths(find_images([], stdin=io.StringIO("p/cat.heatmap.png"))) == ["p/cat.heatmap.png"]


@pytest.fixture
def locked(here, monkeypatch):
    """A folder ``p/locked`` that may not be listed; permissions do not hold for root."""
    touch(here, "p/a.jpg", "p/locked/b.jpg", "p/z/c.jpg")
    scan, access = os.scandir, os.access

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode)
    )
    return here / "p" / "locked"


def test_a_folder_that_cannot_be_listed_is_told(locked):
    found = find_images(["p"])
    assert paths(found) == ["p/a.jpg", "p/z/c.jpg", "p/locked"]
    assert names(found) == ["a", "z/c", "locked"]
    assert paths(find_images(["p/locked"])) == ["p/locked"]
    assert names(find_images(["p/locked"])) == ["locked"]
    assert paths(find_images(["p"], exclude=locked)) == ["p/a.jpg", "p/z/c.jpg"]
    with pytest.raises(ImageError, match="permission denied"):
        read_image(found[-1].path)


def test_a_name_that_is_too_long_for_the_system(here):
    long = "x" * 300 + ".jpg"
    touch(here, "a.jpg")
    found = find_images([], stdin=io.StringIO(f"{long}\na.jpg\n"))
    assert paths(found) == [long, "a.jpg"]
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        read_image(long)
    with pytest.raises(ValueError, match="no such file or folder"):
        find_images([long])


def test_linked_folders_do_not_go_in_circles(here):
    touch(here, "p/a.jpg", "elsewhere/b.jpg")
    (here / "p" / "loop").symlink_to(here / "p")
    (here / "p" / "more").symlink_to(here / "elsewhere")
    assert names(find_images(["p"])) == ["a", "more/b"]


def test_names_are_safe_stems(here):
    long = "x" * 240
    touch(
        here, f"p/{long}.jpg", f"p/{long}y.jpg", 'p/a:b"c.jpg', "p/tab\there.jpg", "p/..dots...jpg"
    )
    found = names(find_images(["p"]))
    assert len(set(found)) == 4
    for name in found:
        assert len(name.encode()) < 140
        assert not set(name) & set('<>:"|?*\\\t')
        (here / f"{name}.{'label' * 8}.overlay.png").touch()
    assert "a_b_c" in found


def test_undecodable_names(here):
    (here / "p").mkdir()
    with open(os.path.join(os.fsencode(here), b"p", b"caf\xe9.jpg"), "wb"):
        pass
    (source,) = find_images(["p"])
    assert source.name == "caf_"
    assert source.path.exists()


def test_names_never_leave_the_output_folder(here):
    touch(here, "a.jpg", "p/q/b.jpg")
    os.chdir(here / "p")
    found = find_images(["../a.jpg", "q/b.jpg", str(here / "p/../p/q")])
    assert names(found) == ["a", "p/q/b"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["gone.jpg"], "no such file or folder"),
        (["*.jpg"], "this glob holds no image"),
        (["empty"], "this folder holds no image"),
        (["-"], "no standard input"),
        ([], "no images were given"),
    ],
)
def test_usage_errors(here, inputs, message):
    touch(here, "empty/notes.txt")
    with pytest.raises(ValueError, match=message):
        find_images(inputs)


def test_missing_list(here):
    with pytest.raises(ValueError, match=r"list\.txt: cannot read the list"):
        find_images([], text_list="list.txt")
