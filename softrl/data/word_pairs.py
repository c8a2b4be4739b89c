"""Pairs of words that are related alike, by category: two pairs make an analogy. Common words, written by hand."""

WORD_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    category: tuple((pair.split("/")[0], pair.split("/")[1]) for pair in pairs.split())
    for category, pairs in {
        "king/queen": (
            "man/woman king/queen prince/princess boy/girl father/mother son/daughter brother/sister husband/wife "
            "uncle/aunt actor/actress he/she his/her him/her grandfather/grandmother nephew/niece gentleman/lady "
            "male/female dad/mom men/women boys/girls"
        ),
        "capitals": (
            "France/Paris Italy/Rome Germany/Berlin Spain/Madrid Japan/Tokyo China/Beijing Russia/Moscow Egypt/Cairo "
            "Greece/Athens Austria/Vienna Poland/Warsaw Cuba/Havana Iran/Tehran Iraq/Baghdad Canada/Ottawa "
            "Portugal/Lisbon Turkey/Ankara Kenya/Nairobi Ireland/Dublin England/London India/Delhi Sweden/Stockholm"
        ),
        "plurals": (
            "cat/cats dog/dogs car/cars house/houses tree/trees book/books river/rivers city/cities country/countries "
            "bird/birds hand/hands eye/eyes child/children foot/feet woman/women student/students road/roads "
            "machine/machines color/colors animal/animals"
        ),
        "past tense": (
            "walk/walked talk/talked play/played look/looked ask/asked go/went see/saw take/took come/came give/gave "
            "run/ran write/wrote speak/spoke find/found think/thought make/made know/knew say/said tell/told "
            "work/worked"
        ),
        "comparatives": (
            "big/bigger small/smaller large/larger high/higher low/lower long/longer short/shorter fast/faster "
            "slow/slower strong/stronger weak/weaker old/older young/younger good/better bad/worse great/greater "
            "easy/easier hard/harder dark/darker cheap/cheaper"
        ),
        "opposites": (
            "good/bad hot/cold big/small high/low long/short fast/slow strong/weak old/young rich/poor light/dark "
            "up/down left/right open/closed true/false easy/difficult hard/soft early/late first/last "
            "positive/negative inside/outside"
        ),
    }.items()
}
