"""What the names of emoji say, and what is held out."""

from diffjax.data.emoji import (
    HELD_OUT_NAMES,
    HELD_OUT_ROLES,
    HELD_OUT_TONES,
    attributes_of,
    held_out,
    parts_of_name,
)


def test_parts_of_held_out_compositions_are_there_apart():
    for who, role in HELD_OUT_ROLES:
        other = {"man": "woman", "woman": "man"}[who]
        assert held_out(f"{who} {role}")
        assert held_out(f"{who} {role} dark skin tone")
        assert not held_out(f"{other} {role}")
    for role, tone in HELD_OUT_TONES.items():
        for who in ("woman ", "man ", ""):
            assert held_out(f"{who}{role} {tone} skin tone")
            assert not held_out(f"{who}{role} unknown skin tone")
            assert not held_out(f"{who}{role}")
    for name in HELD_OUT_NAMES:
        assert held_out(name)
    assert not any(map(held_out, ("green circle", "red heart", "cat face", "purple heart", "cow")))


def test_attributes_are_read_from_names():
    assert parts_of_name("man").role == "man"  # of no role
    assert parts_of_name("kiss woman man dark skin tone light skin tone").tone == ""
    assert attributes_of("yellow square", "Symbols") == {"colour": "yellow", "group": "Symbols"}
    tone = attributes_of("thumbs up medium-light skin tone", "People & Body")
    assert tone["skin tone"] == "medium-light"
    kinds = ("face or animal", "Smileys & Emotion")
    assert attributes_of("crying face", kinds[1])[kinds[0]] == "face"
    assert attributes_of("crying cat", kinds[1])[kinds[0]] == "animal"
    assert kinds[0] not in attributes_of("hot pepper", "Food & Drink")
