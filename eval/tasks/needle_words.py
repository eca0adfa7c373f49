"""Words: the halves of needle keys (`adjective-noun`) from lists of our own, and invented ones."""

ADJECTIVES = """
able agile airy alert amber ample ancient arctic austere autumn balmy bashful bitter bland bleak
blithe blue blunt bold brave breezy brief bright brisk broad bronze brown bumpy calm candid
careful casual cheery chilly civic classic clean clever cloudy coarse cobalt coral cosmic cozy
crafty crimson crisp cubic curious curly daily dainty damp daring deep delicate dense devout
distant docile drowsy dry dusty eager early earnest eastern elastic elated elegant eloquent
emerald endless epic exact exotic faint fair faithful famous fancy fearless feral festive fierce
firm flat floral fluent fond foreign formal fragile frank fresh frosty frugal fuzzy gaudy gentle
giant gilded glad gleaming global golden graceful grand grateful green grim hardy hasty hazy
hearty heavy hidden hollow honest humble humid hushed icy ideal idle indigo inner innocent ivory
jaunty jolly jovial joyful keen kind large lasting lavish lean level light limber limpid linen
little lively lofty lonely loud loyal lucid lucky lunar lyric magenta marble marine mellow merry
mighty mild minty misty modest molten mossy muddy muffled mute naive narrow native neat nimble
noble normal northern novel oaken oblong odd olive opal open orange ornate outer oval pale patient
peaceful pearly placid plain plucky plump polar polite portly prime proud prudent purple quaint
quick quiet radiant rapid rare ready regal remote rigid ripe robust rosy rough round royal ruby
rugged rural rustic rusty sandy scarlet scenic secret serene shady sharp shiny short shy silent
silky silver simple sincere sleek slender slim slow smooth snowy snug sober soft solar solemn
solid somber southern spare spicy spiral sprightly square stable stark steady steep stellar
sterile stern stony stormy stout strict sturdy subtle sudden sunny supple swift tacit tall tame
tangy tawny teal tender tepid thick thorny thrifty tidal tidy timely timid tiny topaz tranquil
trim true trusty turquoise ultra upbeat urban vague valiant vast velvet verdant vernal vintage
violet vital vivid warm watchful wavy western whole wide wild willing windy winged wintry wise
wistful witty wooden woolen wry yellow young youthful zany zealous zesty
""".split()

NOUNS = """
acorn actor album alley almond anchor ankle antler anvil apple apron arbor archer arrow artist
aspen atlas attic avenue badge badger bagel baker balcony ballad bamboo banjo banner barley barn
barrel basil basin basket beacon beaver beetle bell bench berry bishop bison blanket blossom boat
bonnet border bottle boulder bracelet branch brass breeze brick bridge broom brush bucket buckle
buffalo bugle bundle burrow butter button cabin cable cactus camel camera canal candle canoe
canvas canyon captain caravan carbon carpet carriage carrot castle cavern cedar cellar cello chalk
channel chapel chapter cherry chestnut chimney cider cinema circle circus citadel citrus clarinet
clay cliff cloak clock clover coach cobbler coffee collar comet compass copper cottage cotton
cougar council cousin cradle crane crater cricket crow crown crystal cupboard curtain cushion
cymbal cypress dagger dairy dancer decade delta denim desert diamond dolphin donkey doorway dragon
drawer driver drum duchess eagle easel echo eclipse elbow elder elevator ember emblem emperor
engine envelope estate fabric falcon farmer fathom feather fellow fennel fern ferry fiddle field
finch flagship flame flannel flask flint flower flute forest forge fossil fountain fox freight
fringe galaxy gallery garden garlic garnet gate gazelle geyser ginger giraffe glacier glove goblet
gondola goose gorge granite grape gravel grove guitar gull hammer hammock harbor harness harp
harvest hatchet hawk hazel hedge helmet hermit heron hill hinge honey horizon hornet hotel hunter
iceberg inkwell insect island jacket jaguar jasmine jersey jewel jigsaw journal judge jungle
juniper kayak kennel kernel kettle kiln kingdom kitchen kitten knight ladder lagoon lake lamp
lantern larch lark lattice laurel lawyer leaf ledger lemon lens leopard letter lever library
lichen lilac linden lion lizard llama lobster locket locust lodge lotus lumber lute magnet mallet
mammoth mango manor mantle maple marigold market marsh mason meadow medal melody melon merchant
meteor mill miner mirror mitten monarch monsoon moose mortar mosaic moss mountain mug museum
mushroom mustard napkin nectar needle nephew nest nickel notebook nugget nurse nutmeg oasis oboe
ocean octopus office onion orbit orchard orchid organ osprey otter oven owl oyster paddle painter
palace panther paper parade parcel parlor parrot parsley pasture path pavilion peach peacock
pebble pelican pencil penguin pepper perch petal pheasant piano picnic pier pigeon pillar pillow
pilot pine pirate pistachio planet plank plaza plum pocket poem poet pond poplar poppy portal
potato prairie prince prism puddle puffin pulley pumpkin puppet pyramid quail quarry quartz quilt
quiver rabbit raccoon radish raft railway rainbow raisin raven reef reindeer ribbon ridge river
robin rocket rooster rosemary rudder saddle saffron sailor salad salmon sandal sapling satchel
saucer scarf scholar school schooner scooter seashell senator shadow shelter shepherd sherbet
shoulder shovel shrub signal singer skylark sled slipper smoke snail socket soldier sparrow spider
spindle spire sponge spoon spruce squash squirrel stadium staircase stallion star station statue
stork stove stream street studio summit sunset surgeon swallow swan tablet tailor talon tapestry
tavern teacher teapot temple tent terrace theater thicket thimble thistle thread throne thunder
tiger timber tinsel toast tomato torch tower tractor trader trail treasure trellis trident
trombone trophy trout trumpet tulip tundra tunnel turban turnip turtle tuxedo umbrella uncle
valley vase vault veranda vessel viaduct village vineyard viola violin viper volcano voyage waffle
wagon walnut walrus warbler waterfall weasel weaver whale wharf wheat wheel whistle widget willow
window winter wizard wolf wombat workshop wren yacht yarn zebra zephyr zipper
""".split()

WORDS = list(dict.fromkeys(ADJECTIVES + NOUNS))
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_ENDINGS = "nls"
SPELLINGS = range(len(_SYLLABLES) ** 3 * len(_ENDINGS))  # each invented word as a number


def spell(number: int) -> str:
    """Three syllables and a last letter, such as `tavorin`; no two numbers spell the same."""
    letters = _ENDINGS[number % len(_ENDINGS)]
    number //= len(_ENDINGS)
    for _ in range(3):
        number, syllable = divmod(number, len(_SYLLABLES))
        letters = _SYLLABLES[syllable] + letters
    return letters
