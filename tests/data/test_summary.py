"""Counts of a dataset worked out by hand."""

from test_coco import SQUARE, dataset

from dimaskdino.data.check import describe

BOX = {"segmentation": [SQUARE], "bbox": [4, 3, 8, 6]}


def test_counts(tmp_path):
    data = dataset(
        tmp_path,
        [
            BOX,  # 48 pixels, from its box
            BOX | {"area": 32**2},
            BOX | {"area": 96**2, "category_id": 90},
            BOX | {"area": 96**2 - 1},
            BOX | {"iscrowd": 1},
        ],
    )
    found = describe(data.annotations, data.image_folder)
    assert (found.images, found.empty_images, found.objects, found.crowds) == (1, 0, 4, 1)
    assert (found.small, found.medium, found.large) == (1, 2, 1)
    assert [(c.name, c.objects, c.images) for c in found.classes] == [("cup", 3, 1), ("key", 1, 1)]
    assert found.objects_per_image == (4, 4, 4)
    assert found.longest_sides == (24, 24, 24)
    assert found.missing_files == ()
    assert "25 % small (below 32²), 50 % medium, 25 % large" in found.text()


def test_missing_images_and_unused_classes(tmp_path):
    data = dataset(tmp_path, [BOX], file_name="b.png")
    found = describe(data.annotations, data.image_folder)
    assert [path.name for path in found.missing_files] == ["b.png"]
    assert "key                             0 objects" in found.text()
