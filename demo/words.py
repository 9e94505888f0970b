"""Word lists for make_pairs.py.

Every word belongs either to training or to the held-out prompts, never to both.
"""


def phrases(text):
    """The phrases of a text with a bar or a line end between them."""
    return text.strip().replace("\n", "|").split("|")


NOUNS = """
anchor apron arch arrow attic backpack bakery balcony balloon banner barn barrel basket battery beach bell belt bench
bicycle blanket boat boiler bookshelf bottle boundary bridge brochure brush bucket budget building button cabin cabinet
calendar camera campaign candle canoe canvas carpet castle ceiling cellar chair chimney circuit classroom clinic clock
coat college compass computer concert container contract cottage course courtyard cupboard curtain dashboard database
desk device diary dictionary document door drawer dress drill drone drum engine envelope essay exhibition factory farm
fence festival fireplace flag flute forest fountain freezer fridge fuse garage garden gate generator glacier glove
greenhouse guitar gutter hammer hammock harbour hat heater hedge helmet hinge horse hospital hotel instrument invoice
island jacket journal kettle keyboard kitchen kite ladder lake lamp laptop lantern laundry lawn leaflet lease library
lighthouse lock logo machine magazine magnet mailbox map market mattress meadow meeting menu microphone microscope
mirror monument motor mountain museum necklace neighbourhood newsletter notebook oven paddle painting parcel park
partner password path patio pencil pension phone piano picnic pillow pipe planet plant playground pond porch portfolio
poster printer prison project pump puppet puzzle quilt radiator radio railway ramp receipt recipe refrigerator report
restaurant ribbon river robot roof room rope router sail sandwich scarf schedule school scooter screen sculpture shelf
shirt shoe shop shower sign skateboard sketch sofa speaker spreadsheet stable stadium staircase station statue stove
street studio subscription suitcase survey sweater sword symphony table tablet telescope temple tent terrace theatre
thermostat ticket toaster tool tower town tractor trail train treadmill truck trumpet tunnel turbine umbrella uniform
vase vehicle village violin volcano wallet wardrobe warehouse watch waterfall website wheel wheelchair window workshop
""".split()

ADJECTIVES = """
abandoned affordable ancient antique anxious bitter blue bold brave bright broken busy calm careful cheap clean clever
cold colourful comfortable compact complex creaky crowded curious damaged dark delicate digital dirty dull dusty eager
early elegant electric empty enormous expensive faded faulty fragile French friendly frozen funny gentle giant golden
grand green grey handmade happy haunted heavy hidden historic hollow huge humble jammed Japanese large lazy light
little local lonely long loud lucky luxurious massive mechanical medieval messy metal miniature modern modest muddy
mysterious narrow neglected new noisy old online orange ordinary outdoor pale peaceful plain polite popular portable
private public purple quick quiet rare red reliable remote restless round royal rural rusty sacred scratched second-hand
secret shared shiny silent silver simple sleepy slow small smart soft solar Spanish spare squeaky steep sticky strange
striped sturdy sunny tall temporary tidy tiny torn traditional tropical unusual urban useful valuable vintage vivid
warm wide wild wireless wooden yellow young
""".split()

CONCEPTS = phrases("""
photosynthesis|inflation|black holes|quantum computing|machine learning|climate change|the stock market|recursion
plate tectonics|democracy|natural selection|the water cycle|supply and demand|gravity|electric cars|the immune system
blockchain|neural networks|compound interest|the French Revolution|the Roman Empire|ocean currents|renewable energy
stoicism|game theory|cognitive bias|object-oriented programming|relativity|DNA|vaccines|antibiotics|tides|volcanoes
earthquakes|the solar system|monetary policy|behavioural economics|genetic engineering|artificial intelligence|tariffs
cloud computing|cyber security|public speaking|time management|mindfulness|meditation|yoga|remote work|space travel
the Cold War|the Renaissance|the Silk Road|the Industrial Revolution|impressionism|jazz|opera|ballet|chess|origami
calligraphy|beekeeping|composting|nutrition|sleep|stress|anxiety|friendship|honesty|courage|leadership|teamwork
feminism|globalisation|urban planning|public transport|tax returns|mortgages|pension funds|insurance|bitcoin|startups
marketing|search engines|web design|databases|regular expressions|linear algebra|probability|statistics|calculus
fractions|prime numbers|trigonometry|chemical bonds|acids and bases|enzymes|mitosis|evolution|dinosaurs|whales|penguins
coral reefs|rainforests|deserts|glaciers|hurricanes|thunderstorms|rainbows|the northern lights|eclipses|comets|galaxies
dark matter|nuclear fusion|solar panels|wind power|electric motors|semiconductors|lasers|radar|satellites|drones
3D printing|virtual reality|video games|social media|online privacy|open source software|Linux|Python|JavaScript|SQL
HTTP|version control|unit tests|sorting algorithms|hash tables|binary search|operating systems|compilers|encryption
human rights|the constitution|elections|the United Nations|the European Union|free trade|minimum wage|homelessness
recycling|veganism|fast fashion|food waste|organic farming|tea ceremonies|coffee|chocolate|wine|cheese|sourdough bread
Greek mythology|Norse mythology|fairy tales|science fiction|haiku|sonnets|metaphors|grammar|punctuation|sign language
bilingualism|homework|school uniforms|screen time|parenting|ageing|grief|happiness|autumn|winter|spring|summer|snow
the moon|the desert|the ocean|a forest|old age|freedom|war|peace|migration|slavery|colonialism|piracy|the plague
football|cricket|tennis|marathon running|swimming|cycling|rock climbing|skiing|surfing|fishing|gardening|knitting
photography|painting|sculpture|architecture|astronomy|geology|psychology|philosophy|sociology|anthropology|linguistics
""")

PLACES = phrases("""
Lisbon|Kyoto|Nairobi|Reykjavik|Buenos Aires|Cairo|Toronto|Mumbai|Seoul|Prague|Vienna|Oslo|Helsinki|Dublin|Edinburgh
Marrakesh|Istanbul|Athens|Rome|Florence|Naples|Madrid|Seville|Barcelona|Paris|Lyon|Marseille|Berlin|Hamburg|Munich
Warsaw|Krakow|Budapest|Bucharest|Sofia|Belgrade|Zagreb|Tallinn|Riga|Vilnius|Moscow|Kyiv|Tbilisi|Yerevan|Tehran|Delhi
Chennai|Kolkata|Kathmandu|Dhaka|Bangkok|Hanoi|Jakarta|Manila|Taipei|Shanghai|Beijing|Tokyo|Osaka|Sapporo|Sydney
Melbourne|Perth|Auckland|Wellington|Honolulu|Seattle|Portland|Denver|Chicago|Boston|New York|Miami|Houston|Dallas
Mexico City|Havana|Bogota|Lima|Quito|Santiago|Montevideo|Brasilia|Lagos|Accra|Dakar|Tunis|Algiers|Addis Ababa|Kampala
Cape Town|Johannesburg|Zanzibar|Madagascar|Iceland|Norway|Sweden|Finland|Denmark|Germany|France|Spain|Portugal|Italy
Greece|Turkey|Egypt|Kenya|Ghana|Nigeria|Ethiopia|India|Nepal|China|Japan|Vietnam|Thailand|Peru|Chile|Bolivia|Brazil
Canada|Scotland|Wales|Ireland|Texas|California|Alaska|Zürich|São Paulo|Málaga|Córdoba|Göteborg|Kraków|Besançon
""")

FIRST_NAMES = """
Aisha Alan Alice Amara Andre Anna Anton Arthur Beatrice Boris Carlos Carmen Celia Charles Clara Daniel David Diana Diego
Elena Elias Emily Emma Erik Esther Eva Farid Fatima Felix Fiona Frank Gabriel George Gita Grace Greta Hannah Hassan Helen
Henry Hugo Ibrahim Ida Igor Ines Irene Isaac Ivan Jack Jacob James Jane Joan John Jonas Jorge Julia Karim Karl Kate Kenji
Laila Laura Leo Lena Liam Lina Louis Lucia Luke Maria Marco Marie Mark Martha Mary Mei Miguel Mina Mohammed Nadia Nancy
Nina Noah Nora Olga Oliver Omar Oscar Pablo Paul Pedro Peter Petra Priya Rachel Ravi Rosa Ruth Samuel Sara Sergei
Sofia Sherlock Stella Susan Tariq Theo Thomas Tom Ursula Vera Victor Walter Wei Yuki Yusuf Zara Zoe José François
""".split()

SURNAMES = """
Abbott Adams Ahmed Almeida Andersen Archer Bailey Baker Banerjee Barnes Becker Bergman Black Blake Bianchi Brooks Brown
Byrne Campbell Carter Castillo Chen Clarke Cohen Cooper Costa Cruz Curie Darwin Das Diaz Dixon Dubois Eastwood Edison Ellis
Evans Farrell Fischer Fleming Fletcher Foster Fox Garcia Gibson Gomez Gray Green Gupta Hall Hamilton Hansen Harper
Hassan Hayes Hernandez Hoffman Holmes Hughes Hunt Ivanov Jackson Jensen Johnson Jones Kaplan Khan Kim King Klein Kovacs
Kumar Lambert Larsen Lee Lewis Lopez Lovelace Mandela Marsh Martin Mendez Miller Mitchell Moore Morgan Murphy Nakamura Nguyen
Novak Okafor Olsen Park Parker Patel Perez Petrov Popov Quinn Ramirez Reed Reyes Rivera Rossi Russo Santos Sato Schmidt
Shah Silva Singh Smith Stone Suzuki Swift Tanaka Taylor Torres Turner Tesla Vargas Walker Wang Watson Weber White Wilson Wright
Yamamoto Young Zhang Ziegler Müller Nuñez Björk
""".split()

FOODS = phrases("""
apple pie|banana bread|beef stew|borscht|bread|brownies|butter chicken|carrot cake|cheesecake|chicken soup|chili
chocolate cake|couscous|crepes|curry|dumplings|falafel|fish tacos|fried rice|gazpacho|goulash|granola|guacamole|hummus
lasagna|lemon tart|lentil soup|meatballs|moussaka|muffins|mushroom risotto|noodles|oatmeal|omelette|onion soup|paella
pancakes|pasta|pesto|pickles|pizza|porridge|potato salad|pulled pork|pumpkin soup|quiche|ramen|ratatouille|roast duck
salsa|scones|shepherd's pie|stuffed peppers|sushi|tiramisu|tomato sauce|vegetable stew|waffles|yogurt|crème brûlée
""")

JOBS = """
accountant actor architect artist baker barber biologist driver butcher carpenter chef chemist cleaner coach
dentist designer doctor editor electrician engineer farmer firefighter fisherman gardener geologist hairdresser historian
journalist judge lawyer librarian manager mechanic midwife musician nurse painter pharmacist photographer physicist pilot
plumber poet detective postman programmer psychologist receptionist sailor salesman scientist secretary shopkeeper
singer soldier student surgeon tailor teacher translator vet waiter writer
""".split()

AUDIENCES = phrases("""
a ten-year-old|a beginner|beginners|my grandfather|my mother|my father|my sister|my brother|my daughter|my son|my boss
my colleagues|my students|my class|my best friend|my wife|my husband|my neighbour|children|teenagers|adults|tourists
high school students|university students|a job interview|a birthday party|a wedding|a school project|a small business
a blog|my website|a newspaper|a general audience|experts|engineers|nurses|new parents|older people|busy people
a five-year-old|my aunt|my uncle|my cousin|my team|our customers|a charity|a podcast|a presentation|a local newspaper
""")

VERBS = """
assemble borrow build buy carry choose clean collect cover decorate describe design draw explore fix hang improve
insulate install label lift make measure mend move open organise paint photograph polish prepare print protect rebuild
recycle remove rent repair replace restore save secure sell setup sharpen ship shorten store test transport adjust
unblock unlock update wash weigh wrap
""".split()

ACTIVITIES = phrases("""
learn Spanish|learn to swim|lose weight|save money|sleep better|wake up early|write a novel|run a marathon|quit smoking
make new friends|stay motivated|study for an exam|prepare for an interview|start a business|grow tomatoes|grow herbs
train a puppy|adopt a cat|plan a wedding|pack a suitcase|find a job|ask for a raise|write a resume|meet my neighbours
move abroad|speak in public|invest my savings|pay less tax|reduce stress|stop procrastinating|meditate|cook for a family
bake without eggs|sew a button|iron a shirt|remove a stain|change a tyre|jump-start a car|drive in snow|read faster
memorise vocabulary|take better photos|edit a video|record a song|learn the guitar|juggle|solve a cubic equation
sort a list in Python|parse a JSON file|reverse a string|deploy a website|back up my files|speed up my laptop
reset a password|merge two branches|write unit tests|center a div|connect to a database|clean a keyboard
""")

LANGUAGES = """
French Spanish German Italian Portuguese Dutch Swedish Polish Czech Turkish Greek Arabic Hebrew Hindi Urdu Bengali Tamil
Korean Japanese Mandarin Vietnamese Thai Swahili Russian Ukrainian Latin Finnish Norwegian Danish Hungarian
""".split()

PAST_VERBS = """
admired avoided bought carried changed cleaned collected copied counted covered described designed destroyed discovered
drew examined explored finished followed found guarded ignored improved inspected lost loved measured missed moved noticed
opened painted passed photographed praised reached remembered repaired replaced reported sold saved shared stored studied
tested touched used visited wanted watched
""".split()

REQUEST_VERBS = """
Add Adapt Advertise Analyse Announce Arrange Assess Calculate Categorise Check Choose Classify Collect Combine Complete
Compose Construct Convert Create Criticise Decide Define Demonstrate Design Determine Develop Discuss Draft Draw Edit
Estimate Evaluate Examine Expand Explore Extract Find Formulate Generate Give Group Highlight Identify Illustrate Imagine
Improve Invent Investigate Justify Label Make Match Measure Modify Name Narrate Order Organise Outline Paint Paraphrase
Predict Prepare Present Produce Promote Propose Prove Provide Quote Rank Rate Recite Reduce Rephrase Report Research
Review Revise Rewrite Select Show Simplify Sketch Solve Sort Split State Suggest Support Teach Test Think Update Use Verify
""".split()
