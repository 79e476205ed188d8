"""Links in a folder of images: followed, or refused by name, but never passed over in silence."""

from pathlib import Path

import pytest
from PIL import Image

from diffjax.data.image_folders.folder import FolderSource, image_folder
from diffjax.errors import UserError


def picture(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2)).save(file)
    return file


@pytest.fixture
def root(tmp_path):
    """Two classes of two images, and two more elsewhere."""
    for name in ("root/cat/0.png", "root/cat/1.png", "root/dog/0.png", "root/dog/1.png"):
        picture(tmp_path / name)
    for name in ("far/deep/2.png", "far/3.png"):
        picture(tmp_path / "elsewhere" / name)
    return tmp_path / "root"


def files(root: Path) -> list[tuple[str, int]]:
    """Every image's name and label."""
    data = image_folder(str(root), image_size=2)
    found = []
    for source in (data.train, data.test):
        assert isinstance(source, FolderSource)
        found += zip(source.files, source.labels.tolist(), strict=True)
        assert all(source[i]["image"].shape == (2, 2, 3) for i in range(len(source)))
    return sorted(found)


OWN = [("cat/0.png", 0), ("cat/1.png", 0), ("dog/0.png", 1), ("dog/1.png", 1)]


def test_a_link_to_a_folder_within_a_class_is_followed(root):
    (root / "dog/more").symlink_to(root.parent / "elsewhere")
    more = [("dog/more/far/3.png", 1), ("dog/more/far/deep/2.png", 1)]
    assert files(root) == sorted(OWN + more)


def test_a_link_to_an_image_is_followed(root):
    (root / "dog/2.png").symlink_to(root.parent / "elsewhere/far/3.png")
    assert files(root) == sorted([*OWN, ("dog/2.png", 1)])


def test_a_class_that_is_a_link_is_a_class(root):
    (root / "elk").symlink_to(root.parent / "elsewhere/far")
    assert files(root) == sorted([*OWN, ("elk/3.png", 2), ("elk/deep/2.png", 2)])


def test_a_folder_that_is_itself_a_link_is_the_same(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert files(tmp_path / "link") == OWN


def test_two_links_to_one_folder_are_no_loop(root):
    for name in ("a", "b"):
        (root / "dog" / name).symlink_to(root.parent / "elsewhere/far/deep")
    assert files(root) == sorted([*OWN, ("dog/a/2.png", 1), ("dog/b/2.png", 1)])


@pytest.mark.parametrize("where", ["all", "cat/again", "cat/deep/again"])
@pytest.mark.parametrize("up", ["root", "root/cat", "."])
def test_a_link_that_leads_back_is_named(root, where, up):
    """Whether to its own class, to the whole folder or to what holds that."""
    link, target = root / where, (root.parent / up).resolve()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    if where == "all" and up == "root/cat":
        assert files(root)[0] == ("all/0.png", 0)  # a class twice is no loop
        return
    with pytest.raises(UserError) as refusal:
        image_folder(str(root))
    said = str(refusal.value)
    assert "its own parent folder" in said
    assert str(link) in said
    assert "\n" not in said


@pytest.mark.parametrize("where", ["elk", "7.png", "dog/7.png", "dog/more", "dog/deep/7.png"])
def test_a_link_to_what_is_not_there_is_named(root, where):
    """An image, a folder within a class or a whole class."""
    link = root / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("/no/such/place")
    with pytest.raises(UserError) as refusal:
        image_folder(str(root))
    assert str(refusal.value) == f"{link} is a link to /no/such/place, which does not exist"


def test_a_link_to_itself_is_named(root):
    link = root / "dog/me.png"
    link.symlink_to(link)
    with pytest.raises(UserError, match=r"me\.png is a link to"):
        image_folder(str(root))


def test_hidden_links_are_ignored(root):
    (root / "dog/.gone").symlink_to("/no/such/place")
    (root / ".up").symlink_to(root)
    assert files(root) == OWN
