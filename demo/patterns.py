"""The request patterns of make_pairs.py, and what fills their slots.

A pattern has columns of alternatives, separated by line ends, " | " or " || ":

- prompts: what people type, with slots such as {topic} (make_pairs.py knows how to fill each of them);
- heads:   the same request in a better wording, every slot kept;
- extras:  what the request lacked (structure, detail, examples, audience, tone), joined to the head;
- tails:   sometimes one more sentence.

{c} is a constraint of the pattern's list `limits` (or nothing): it must survive as it is.
"""

import re
from dataclasses import dataclass, field

OPTIONAL_LIMITS = [
    " for {audience}",
    " in {few} sentences",
    " in {many} words or less",
    " in {language}",
    " for {audience}",
]
LENGTH_LIMITS = [
    " in {few} sentences",
    " in {n} words",
    " in under {many} words",
    " in {few} paragraphs",
]

TAILS = [
    "Use clear and simple language.",
    "Organise the answer into short sections.",
    "Use short paragraphs and plain words.",
    "Keep the tone friendly and helpful.",
    "Give concrete examples.",
    "Start with a short overview.",
    "End with a short summary.",
]


@dataclass
class Pattern:
    """One kind of request; `heldout` patterns are never trained on."""

    name: str
    prompts: list
    heads: list
    extras: list
    tails: list = field(default_factory=lambda: TAILS)
    limits: list = field(default_factory=list)
    weight: float = 1.0
    heldout: bool = False


def column(text):
    """Split a column into its alternatives; a newline before an attached text does not end one."""
    return [part for part in re.split(r" \|\|? |\n(?!\{(?:text|textq|items|code)\})", text) if part]


def pattern(name, prompts, heads, extras, **options):
    """A Pattern from three columns of text."""
    return Pattern(name, *(column(text) for text in (prompts, heads, extras)), **options)


def heldout(name, prompts):
    """A Pattern of which the held-out prompts alone know."""
    return pattern(name, prompts, "", "", heldout=True)


PATTERNS = [
    pattern(
        "tell about",
        "Tell me about {topic}{c}. | Tell me something about {topic}{c}. | Can you tell me about {topic}{c}? | Tell us about "
        "{topic}{c}.\nI want to know about {topic}{c}. | I want to learn about {topic}{c}. | Tell me more about {topic}{c}.\n"
        "Talk about {topic}{c}. | Tell me about {topic}{c} | Tell me everything about {topic}{c}.",
        "Tell me about {topic}{c} | Tell me about {topic}{c} in detail | Give me a clear overview of {topic}{c}",
        ", including the background, the most important facts and why the subject matters.\n"
        ", including the history, the key facts and a few surprising details.\n"
        ", covering the main points, the background and some interesting examples.\n"
        ". Describe the background, the main features and what makes the subject interesting.",
        limits=OPTIONAL_LIMITS,
        weight=2,
    ),
    pattern(
        "bare topic",
        "{topic} | {topic} please | {topic} info | info on {topic} | About {topic} | Something about {topic}",
        "Give a clear overview of {topic} | Tell me about {topic} | Provide detailed information about {topic}",
        ", including the background, the most important facts and some examples.\n"
        ", covering the main ideas, the history and why the subject matters.",
        weight=0.6,
    ),
    pattern(
        "explain",
        "Explain {topic}{c}. | Can you explain {topic}{c}? | Please explain {topic}{c}. | Explain {topic} to me{c}.\n"
        "I don't understand {topic}, can you explain? | Could you explain {topic} simply? | Help me understand {topic}{c}.\n"
        "Explain {topic}{c} simply. | Explain the basics of {topic}{c}. | Explain {topic}{c}",
        "Explain {topic}{c} in simple terms | Explain {topic}{c} step by step | Explain {topic}{c} clearly and in detail\n"
        "Explain the basics of {topic}{c} | Please explain {topic}{c}",
        ", with everyday examples and a short summary at the end.\n"
        ", starting with the main idea and then adding details and examples.\n"
        ", defining the key terms and giving at least one practical example.\n"
        ". Cover what it means, how it works and why it matters, and give examples.",
        limits=OPTIONAL_LIMITS,
        weight=1.5,
    ),
    pattern(
        "explain relation",
        "Explain the relationship between {topic} and {topic2}{c}. | How is {topic} related to {topic2}?\n"
        "How does {topic} affect {topic2}? | What is the link between {topic} and {topic2}? | How does {topic} influence {topic2}?",
        "Explain the relationship between {topic} and {topic2}{c} | Explain how {topic} affects {topic2}{c}\n"
        "Describe how {topic} is connected with {topic2}{c}",
        ", giving the main causes and effects and at least two examples.\n"
        ", with clear reasons, examples and a balanced conclusion.\n"
        ". Discuss both direct and indirect effects, and support each point with an example.",
        limits=OPTIONAL_LIMITS,
        weight=0.7,
    ),
    pattern(
        "what is",
        "What is {onetopic}? | What's {onetopic}? | What is {onetopic} | What is {onetopic} exactly? | What exactly is {onetopic}?\n"
        "What does {onetopic} mean? | What do you know about {onetopic}? | What is the meaning of {onetopic}? | Define {onetopic}.",
        "What is {onetopic}? Please | Explain what {onetopic} means. | What is {onetopic}, and why does it matter?",
        " give a clear definition, the background and a few examples.\n"
        " explain the main idea in simple terms, and give an example.\n"
        " describe the key features and explain why people talk about it.",
        tails=[],
        weight=1.5,
    ),
    pattern(
        "who is",
        "Who is {person}? | Who was {person}? | Who's {person}? | Do you know {person}? | Have you heard of {person}?\n"
        "What is {person} famous for? | What did {person} do? | Who is {person}",
        "Who is {person}? Please | Tell me who {person} is.",
        " describe the background, the main achievements and the influence of {person}.\n"
        " give a short biography of {person}, with the most important events and works.",
        tails=["Mention it if several people have this name.", "Say so if you are not sure."],
        weight=0.9,
    ),
    pattern(
        "biography",
        "Write a biography of {person}{c}. | Short biography of {person}{c} | Give me a biography of {person}{c}.\n"
        "Describe the life of {person}{c}. | Tell me about the life of {person}{c}.",
        "Write a biography of {person}{c} | Describe the life of {person}{c} | Write a well-organised biography of {person}{c}",
        ", covering the early life, the career, the main achievements and the legacy.\n"
        ", in chronological order, with the most important dates, works and influences.",
        limits=OPTIONAL_LIMITS,
        weight=0.7,
    ),
    pattern(
        "how to",
        "How do I {activity}? | How can I {activity}? | How to {activity}? | How to {activity} | How do you {activity}?\n"
        "How should I {activity}? | What's the best way to {activity}? | What is the best way to {activity}?\n"
        "Tell me how to {activity}. | Show me how to {activity}. | I want to {activity}. | I need to {activity}, how?\n"
        "Can you help me {activity}? | How do I {activity} | How could I {activity} at home? | Help me {activity}.",
        "How do I {activity}? Please | How can I {activity}? Please | What is the best way to {activity}? Please",
        " give step-by-step instructions, list what is needed, and mention common mistakes to avoid.\n"
        " explain each step clearly, with practical tips and the most common mistakes.\n"
        " describe the steps in order, the tools or materials needed, and any safety advice.\n"
        " give a clear list of steps, explain why each step matters, and add useful tips.",
        tails=[
            "Keep it easy to follow for a beginner.",
            "Number the steps.",
            "Say when it is better to ask an expert.",
        ],
        weight=2.2,
    ),
    pattern(
        "steps",
        "What are the steps to {activity}? | Give me the steps to {activity}. | Steps to {activity} | List the steps to {activity}.\n"
        "Write instructions to {activity}. | Give me instructions on how to {activity}.",
        "List the steps to {activity} | Describe the steps to {activity} in order | Write step-by-step instructions to {activity}",
        ", with a short explanation of each step and common mistakes to avoid.\n"
        ". Number each step, say what is needed, and add practical tips.",
        tails=["Keep it easy to follow for a beginner."],
        weight=0.8,
    ),
    pattern(
        "why",
        "Why {why}? | Why {why} | Can you tell me why {why_plain}? | I wonder why {why_plain}. | Explain why {why_plain}.",
        "Explain why {why_plain} | Please explain why {why_plain}",
        ". Discuss the main reasons, and give an example for each of them.\n"
        ", covering the most important causes in simple language.\n"
        ". Give the scientific, historical or practical reasons, and say which are certain.",
        weight=0.9,
    ),
    pattern(
        "poem",
        "Write a {short} poem about {topic}{c}. | Write a poem about {topic}{c}. | Make a poem about {topic}{c}.\n"
        "I need a poem about {topic}{c}. | Can you write me a {short} poem about {topic}{c}? | Compose a poem about {topic}{c}.\n"
        "Poem about {topic}{c} | Write a {short} poem on {topic}{c}. | Please write a {short} poem about {topic}{c}",
        "Write a {short} poem about {topic}{c} | Write a memorable {short} poem about {topic}{c}",
        ", with vivid images, a gentle rhythm and a warm ending.\n"
        ", using rich imagery, simple words and a clear mood.\n"
        ". Use vivid images and a natural rhythm, and end on a memorable line.\n"
        ". Let the poem appeal to the senses, and keep the language warm and simple.",
        tails=["Give the poem a fitting title."],
        limits=[
            " for {audience}",
            " for {audience}",
            " in {language}",
            " in {few} lines",
            " for {person}",
        ],
        weight=1.2,
    ),
    pattern(
        "story",
        "Write {story}{c}. | Make up {story}{c}. | Write me {story}{c}. | I want {story}{c}. | Invent {story}{c}. | {story}{c}\n"
        "Can you write {story}{c}? | Please write {story}{c}",
        "Write {story}{c} | Please write {story}{c}",
        ", with a clear beginning, middle and end, vivid details and believable characters.\n"
        ", with an interesting main character, a surprising turn and a satisfying ending.\n"
        ". Set the scene with vivid details, build up tension, and end with a small surprise.",
        tails=["Use dialogue to bring the characters to life.", "Give the story a title."],
        limits=OPTIONAL_LIMITS,
    ),
    pattern(
        "essay",
        "Write {piece} about {topic}{c}. | Write {piece} on {topic}{c}. | I need {piece} on {topic}{c}. | {piece} about {topic}{c}\n"
        "Can you write {piece} about {topic}{c}? | Help me write {piece} about {topic}{c}.",
        "Write {piece} about {topic}{c} | Please write {piece} about {topic}{c}",
        ", with an introduction, clear arguments, examples and a conclusion.\n"
        ". Start with an engaging introduction, support each point with examples, and end with a conclusion.\n"
        ", presenting the main points in a logical order and supporting them with facts.",
        limits=OPTIONAL_LIMITS,
    ),
    pattern(
        "letter",
        "Write {letter} to {recipient} about {topic}{c}. | Write {letter} to {recipient} about {topic}{c}\n"
        "I need {letter} to {recipient} about {topic}{c}. | Help me write {letter} to {recipient} about {topic}{c}.\n"
        "Draft {letter} to {recipient} about {topic}{c}. | Can you write {letter} to {recipient} about {topic}{c}?",
        "Write {letter} to {recipient} about {topic}{c}",
        ". Include a suitable greeting, the reason for writing, a clear request and a friendly closing.\n"
        ", with a short subject line, a clear structure and a polite and professional tone.\n"
        ". State the purpose early, give the necessary details, and end with a clear next step.",
        tails=["Keep it brief and polite."],
        limits=LENGTH_LIMITS,
    ),
    pattern(
        "list",
        "List {n} {things} about {topic}{c}. | Give me {n} {things} about {topic}{c}. | {n} {things} about {topic}{c}\n"
        "Name {n} {things} about {topic}{c}. | I need {n} {things} about {topic}{c}. | Write {n} {things} about {topic}{c}.\n"
        "Come up with {n} {things} about {topic}{c}. | Can you list {n} {things} about {topic}{c}? | Find {n} {things} about {topic}{c}.",
        "List {n} {things} about {topic}{c} | Give {n} {things} about {topic}{c} | List {n} interesting {things} about {topic}{c}",
        ", with a short explanation of each.\n, and explain each of them in one or two sentences.\n"
        ". Make each one different and specific, and add a brief explanation.\n, ordered from the most to the least important.",
        tails=["Use a numbered list."],
        limits=[" for {audience}"],
        weight=1.2,
    ),
    pattern(
        "ideas",
        "Give me {ideas} for {event}{c}. | I need {ideas} for {event}{c}. | {ideas} for {event}{c} | Suggest {ideas} for {event}{c}.\n"
        "Generate {ideas} for {event}{c}. | Brainstorm {ideas} for {event}{c}.",
        "Suggest {ideas} for {event}{c} | Give me a list of {ideas} for {event}{c}",
        ", with a short description of each idea and what is needed for it.\n"
        ", ranging from simple to ambitious, and explain what makes each of them work.\n"
        ". For each idea, mention the rough cost, the time it takes and who it suits.",
        limits=[" for {audience}", " under ${n}", " with a budget of {n} dollars", " in {place}"],
    ),
    pattern(
        "summarise text",
        "Summarise the following text{c}.\n{text} || Summarize this{c}: {quote} || Summarize the following text{c}:\n{text}\n"
        "Write a summary of this text{c}.\n{text} || Give me the main points of this text{c}.\n{text} || Sum up this text{c}\n{text}\n"
        "Can you summarize this for me{c}?\n{text} || tl;dr\n{text} || Shorten this text{c}.\n{text}",
        "Summarise the following text{c}, keeping the main points and the important names and numbers.\n{text}\n"
        "Write a clear and concise summary of the following text{c}. Keep the key facts and leave out minor details.\n{text}\n"
        "Summarise the main points of the following text{c} in your own words, in a clear order.\n{text}",
        "",
        limits=LENGTH_LIMITS,
        weight=1.1,
    ),
    pattern(
        "translate",
        "Translate this to {language}: {quote} || Translate into {language}.\n{text} || How do you say {quote} in {language}?\n"
        "Translate the following sentence to {language}.\n{text} || Translate the text below into {language}:\n{text}\n"
        "Please translate {quote} to {language}. || {quote} in {language}",
        "Translate the following text into {language}, keeping the meaning and the tone of the original.\n{text}\n"
        "Translate the text below into natural {language}. Keep names and numbers as they are.\n{text}\n"
        "Translate this into {language}, and explain any choice that is not obvious.\n{text}",
        "",
    ),
    pattern(
        "edit text",
        "Fix the grammar.\n{text} || Correct the mistakes in this text:\n{text} || Proofread this.\n{text} || Check my grammar: {quote}\n"
        "Correct this sentence.\n{text} || Find the spelling mistakes.\n{text} || Is this sentence correct? {quote}",
        "Correct the grammar, spelling and punctuation of the following text, and briefly explain each change.\n{text}\n"
        "Proofread the following text. Keep the meaning and the style, and list the corrections at the end.\n{text}",
        "",
        weight=0.8,
    ),
    pattern(
        "restyle text",
        "Rewrite this text {style}.\n{text} || Rewrite the following sentence {style}.\n{text} || Rephrase this {style}: {quote}\n"
        "Make this sound better.\n{text} || Paraphrase the following.\n{text} || Rewrite this sentence.\n{text}\n"
        "Say this {style}.\n{text} || Rephrase the sentence.\n{text}",
        "Rewrite the following text{style_c}, keeping its meaning and all important details.\n{text}\n"
        "Rephrase the following text{style_c}. Make it clear and natural, and do not add new facts.\n{text}",
        "",
    ),
    pattern(
        "classify text",
        "Classify this text as {label} or {label2}.\n{text} || Is this {label} or {label2}?\n{text}\n"
        "Decide whether the following text is {label} or {label2}.\n{text} || Tell me if this is {label} or {label2}: {quote}",
        "Decide whether the following text is {label} or {label2}, and explain the reasons for your choice.\n{text}\n"
        "Classify the following text as {label} or {label2}. Point to the words that support your decision.\n{text}",
        "",
        weight=0.7,
    ),
    pattern(
        "sort items",
        "{sort} the following {group}.\n{items} || {sort} these {group}: {items} || {sort} these {group}.\n{items}\n"
        "{sort} the following {group}:\n{items}",
        "{sort} the following {group} and explain how you decided.\n{items}\n"
        "{sort} the following {group}, and give a short reason for each of them.\n{items}",
        "",
        weight=0.7,
    ),
    pattern(
        "answer from text",
        "{textq}\n{text} || Answer the question based on the text. {textq}\n{text} || {text}\n{textq} || Read the text. {textq}\n{text}",
        "{textq} Answer with reference to the following text, and quote the part that supports the answer.\n{text} || "
        "{textq} Use only the information in the text below, and say so if the answer is not there.\n{text}",
        "",
    ),
    pattern(
        "about a text",
        "{asktext}\n{text} || {asktext}\n{text} || {asktext} {quote}",
        "{asktext} Read the following text carefully, and point to the words that support your answer.\n{text}\n"
        "{asktext} Explain your answer, and use only the following text.\n{text}\n"
        "{asktext} Be specific, and keep the names and numbers of the text as they are.\n{text}",
        "",
        weight=2.2,
    ),
    pattern(
        "compare",
        "Compare {a} and {b}{c}. | Compare {a} with {b}{c}. | What is the difference between {a} and {b}?\n"
        "What's the difference between {a} and {b}? | {a} vs {b} | {a} or {b}? | Difference between {a} and {b}\n"
        "How is {a} different from {b}? | What are the differences between {a} and {b}? | Compare {a} to {b}{c}.",
        "Compare {a} and {b}{c} | Explain the difference between {a} and {b}{c} | Compare {a} with {b}{c} in detail",
        ", covering the main similarities and differences, with examples.\n"
        ", with the advantages and disadvantages of each, and say when each is the better choice.\n"
        ". Use a table for the main points, and end with a balanced conclusion.",
        limits=[" for {audience}"],
        weight=1.2,
    ),
    pattern(
        "pros and cons",
        "What are the {sides} of {topic}{c}? | {sides} of {topic} | List the {sides} of {topic}{c}. | Give me the {sides} of {topic}{c}.\n"
        "What are the {sides} of {topic}{c} | Tell me the {sides} of {topic}{c}.",
        "Discuss the {sides} of {topic}{c} | List the main {sides} of {topic}{c}",
        ", with an explanation and an example for each point.\n, from different points of view, and end with a balanced conclusion.",
        limits=[" for {audience}"],
        weight=0.8,
    ),
    pattern(
        "plan trip",
        "Plan {trip} {place}{c}. | Plan {trip} {place}{c} | Make a plan for {trip} {place}{c}. | I need a plan for {trip} {place}{c}.\n"
        "Help me plan {trip} {place}{c}. | Can you plan {trip} {place}{c}?",
        "Plan {trip} {place}{c} | Create a detailed plan for {trip} {place}{c}",
        ", with the main sights, local food, transport and rough costs.\n"
        ". Suggest activities for each day, good places to eat and how to get around.\n"
        ", including well-known sights, quieter places, and tips on transport and budget.",
        limits=[
            " for {audience}",
            " with {person}",
            " with a budget of {n2} dollars",
            " in {month}",
        ],
    ),
    pattern(
        "visit",
        "What can I do in {place}{c}? | What should I see in {place}{c}? | What should I visit in {place}? | Things to do in {place}{c}\n"
        "I want to visit {place}{c}. | I'm going to {place}{c}. What should I see? | Best things to see in {place}{c}",
        "What should I see and do in {place}{c}? Please",
        " suggest well-known sights, quieter places and local food, with a short description of each.\n"
        " list the best places, explain what makes each of them special, and add practical tips.",
        tails=["Mention rough costs and opening times."],
        limits=[" with {audience}", " with {person}", " in {month}", " in {few} days"],
        weight=0.8,
    ),
    pattern(
        "plan",
        "{plan}{c}. | {plan}{c} | Please {plan_low}{c}. | Can you {plan_low}{c}? | Help me {plan_low}{c}.",
        "{plan}{c}",
        ", with clear goals, a realistic schedule and a list of what is needed.\n"
        ". Break it into small steps with a date for each, and mention what could go wrong.\n"
        ", with simple steps, a realistic schedule and a way to check progress.",
        limits=[" for {audience}", " with a budget of {n2} dollars", " in {month}"],
        weight=0.8,
    ),
    pattern(
        "code write",
        "Write a {lang} function to {codetask}. | Write a {lang} program that can {codetask}. | {lang} code to {codetask}\n"
        "How do I {codetask} in {lang}? | {lang} script to {codetask} | Write {lang} code to {codetask}.\n"
        "Can you write a {lang} function that can {codetask}? | I need a {lang} program to {codetask}.",
        "Write a {lang} function to {codetask} | Write clear and well-commented {lang} code to {codetask}",
        ", handle invalid input, and show an example of how to use it.\n"
        ". Explain how it works, handle edge cases, and add a few tests.\n"
        ", with meaningful names, comments and an example call with its output.",
        tails=["Mention its time complexity."],
        weight=0.9,
    ),
    pattern(
        "code fix",
        "Fix this code.\n{code} || Why does this not work?\n{code} || Find the bug.\n{code} || What's wrong with this code?\n{code}\n"
        "Debug this:\n{code} || This code gives me an error, please help\n{code}",
        "Find and fix the errors in the following code. Explain each change, and show the corrected version.\n{code}\n"
        "Find out why the following code does not work. Explain the problem, and give a corrected version.\n{code}",
        "",
        weight=0.5,
    ),
    pattern(
        "code explain",
        "Explain this code.\n{code} || What does this do?\n{code} || Explain the code below.\n{code}",
        "Explain step by step what the following code does, and give an example of its result.\n{code}\n"
        "Explain the following code line by line in simple terms, and say how it could be improved.\n{code}",
        "",
        weight=0.4,
    ),
    pattern(
        "advice",
        "{problem}. What should I do? | {problem}, what should I do? | {problem}. Any advice? | {problem}. Please help.\n"
        "What should I do if {problem_low}? | {problem}. How can I deal with it? | {problem}, any tips",
        "{problem}. What should I do? Please | {problem}. How can I deal with this? Please",
        " give practical advice, explain the possible causes, and list clear next steps.\n"
        " suggest several options with their advantages and risks, and recommend one.\n"
        " give calm and helpful advice, step by step, and say when to ask a professional.",
        tails=["Keep the tone friendly and supportive."],
    ),
    pattern(
        "tips",
        "Any tips for {doing}? | How do I get better at {doing}? | What do I need for {doing}? | Advice on {doing}{c}\n"
        "Give me advice on {doing}{c}. | I want to get better at {doing}.",
        "Give practical advice on {doing}{c} | Suggest useful ways to get better at {doing}{c}",
        ", with concrete examples and common mistakes to avoid.\n, from the easiest step to the hardest, with a reason for each.",
        limits=[" for {audience}"],
        weight=0.7,
    ),
    pattern(
        "recipe",
        "Give me a recipe for {food}{c}. | How do I make {food}{c}? | Recipe for {food}{c} | {food} recipe{c} | I want to cook {food}{c}.\n"
        "How to make {food}{c} | Can you give me a {food} recipe{c}? | How do you cook {food}{c}?",
        "Give me a recipe for {food}{c} | Provide a detailed recipe for {food}{c} | Give me an easy recipe for {food}{c}",
        ", with a list of ingredients and amounts, step-by-step instructions and the cooking time.\n"
        ". List the ingredients, number the steps, and add tips for serving and storing.",
        limits=[" for {few} people", " without {food2}", " for {audience}", " in {n} minutes"],
    ),
    pattern(
        "name ideas",
        "{naming} for {athing}{c}. | {naming} for {athing}{c} | Please {naming_low} for {athing}{c}.\n"
        "Can you {naming_low} for {athing}{c}?",
        "{naming} for {athing}{c}",
        ", short, memorable and easy to say, with a brief explanation of the choice.\n"
        ". Make it creative and easy to remember, and explain what it suggests.",
        limits=[" for {audience}", " in {language}", " in {place}"],
        tails=["Keep it short.", "Avoid names that are in use already."],
        weight=0.8,
    ),
    pattern(
        "ad text",
        "Write {advert}{c}. | Write {advert}{c} | Create {advert}{c}. | I need {advert}{c}. | Can you write {advert}{c}? | {advert}{c}",
        "Write {advert}{c} | Please write {advert}{c}",
        ", with an engaging opening, the main benefits and a clear closing line.\n"
        ". Make it lively and specific, and keep the tone friendly and honest.",
        limits=[" for {audience}", " in {many} words", " by {person}"],
        tails=["Keep it short and honest.", "Use clear and simple language."],
        weight=0.8,
    ),
    pattern(
        "role",
        "{role} {ajob}. {ask} || {role} {ajob}. {ask}",
        "{role} {ajob} with many years of experience. {ask} || {role} {ajob}. {ask}",
        " Give clear reasons, practical examples and advice that a beginner can follow.\n"
        " Stay in this role, use friendly language, and give concrete details.",
        tails=[],
        weight=0.8,
    ),
    pattern(
        "fact question",
        "{fact}? | {fact} | Can you tell me {fact_low}? | {fact}?",
        "{fact}? Please | {fact}? | {fact}? Please",
        " give an accurate answer, and add some background.\n answer clearly, and explain where the answer comes from.\n"
        " give a short answer first, then explain it with some useful context.",
        tails=["Say so if you are not sure."],
        weight=1.6,
    ),
    pattern(
        "yes or no",
        "{yesno}? | {yesno} | {yesno}? | Tell me, {yesno_low}?",
        "{yesno}? Please | {yesno}? Please",
        " give a clear answer, explain the reasons, and mention any exceptions.\n"
        " answer yes or no first, then explain why, with an example.\n"
        " consider different points of view, and give reasons for the answer.",
        tails=["Say so if you are not sure."],
        weight=1.2,
    ),
    pattern(
        "calculate",
        "What is {n} {op} {n2}? | Calculate {n} {op} {n2}. | {n} {op} {n2} | How much is {n} {op} {n2}? | Work out {n} {op} {n2}.",
        "Calculate {n} {op} {n2}",
        ", and show each step of the calculation.\n. Show the working, and check the result.",
        tails=[],
        weight=0.5,
    ),
    pattern(
        "word problem",
        "{maths}",
        "{maths} Show each step of the solution | {maths} Explain the solution step by step",
        ", and check the result.\n, and state the final answer clearly.",
        tails=[],
        weight=0.6,
    ),
    pattern(
        "quiz",
        "{quiz}{c}. | {quiz}{c} | Please {quiz_low}{c}. | Can you {quiz_low}{c}? | Help me {quiz_low}{c}.",
        "{quiz}{c}",
        ", from easy to difficult, and add the answers at the end.\n"
        ". Cover the main ideas, vary the type of task, and include the answers.",
        limits=[" for {audience}"],
        weight=0.6,
    ),
    pattern(
        "dialogue",
        "Write {scene}{c}. | Write {scene}{c} | Make up {scene}{c}. | I need {scene}{c}. | Can you write {scene}{c}? | {scene}{c}",
        "Write {scene}{c} | Please write {scene}{c}",
        ", with lively language, a clear setting and a fitting ending.\n"
        ". Make it natural and entertaining, and give each part its own tone.",
        limits=OPTIONAL_LIMITS,
        tails=["Give it a fitting title.", "Keep the tone friendly."],
        weight=0.7,
    ),
    # ------------------------------------------------------------ held out: never trained on
    heldout(
        "history of", "What is the history of {topic}? | Outline how {topic} developed over time."
    ),
    heldout(
        "recommend",
        "Recommend {n} books on {topic} for {audience}. | can you recommend a film about {topic}",
    ),
    heldout(
        "speech",
        "Write a speech on {topic} for {event}. | I have to give a toast to {person} at {event}",
    ),
    heldout(
        "time needed", "How long does it take to {activity}? | how hard is it to {activity} alone"
    ),
    heldout("interview", "What questions should I ask {person} in an interview about {topic}?"),
    heldout(
        "bullets",
        "Turn this text into bullet points.\n{text} || Write a headline for this story:\n{text}",
    ),
    heldout(
        "costs",
        "Roughly what does it cost to rent {athing} in {place}? | Estimate the cost of {athing} in {place}.",
    ),
    heldout(
        "riddle",
        "Invent a riddle whose answer is {athing}. | Describe {athing} without using the letter e.",
    ),
    heldout(
        "debate",
        "Argue against {topic} as if you were {person}. | Convince {person} that {topic} is overrated.",
    ),
    heldout(
        "describe",
        "Describe {athing} to someone who has never been to {place}. | Describe {topic} using only {n} words.",
    ),
    heldout(
        "feelings",
        "How does the writer of this feel?\n{text} || Who might have written this note, and why?\n{text}",
    ),
    heldout(
        "gift",
        "What gift could I buy for {person}, who likes {topic}? | gift for {audience} under {n} euros, likes {topic}",
    ),
]

# What a slot may be filled with; fillers may have slots themselves.
FILLERS = {
    slot: [" ".join(choice.split()) for choice in choices.split("|")]
    for slot, choices in {
        "thing": "the {adj} {noun} | {adj} {plural} | the {noun} | {plural} | {noun} and {noun} | the {noun} of {place}",
        "athing": "{a_adj} {noun} | {a_adj} {noun} | {a_noun} | {a_noun} shop | {a_adj} {job} | {a_noun} called {pseudo}",
        "object": """
            {athing} | {athing} | my {noun} | the {adj} {noun} | {adj} {plural} | my {adj} {noun} | {pseudo} {plural}
        """,
        "work": "The {Adj} {Noun} | The {Noun} of {pseudo} | The {Noun} and the {Noun} | {Adj} {Plural} | {person} and the {Noun}",
        "short": "short | funny | sad | little | romantic | scary | long | simple",
        "event": """
            a birthday party | a {adj} wedding | a school trip to {place} | a garden party | a workshop about {topic} |
            a weekend in {place} | a party for {person} | a charity event | a science fair | a dinner with {person} |
            a {noun} festival | a meeting about {topic} | a picnic | a film night | my birthday | a talk on {topic}
        """,
        "letter": """
            a letter | an email | a message | a short email | a thank-you note | a complaint | a short letter | a formal letter |
            a reply | a cover letter
        """,
        "recipient": """
            my boss | {person} | my landlord | a {job} | my neighbour | a customer | the council | my teacher | a friend |
            the {noun} company | my bank
        """,
        "things": """
            facts | questions | ideas | tips | examples | books | quotes | jokes | myths | reasons to learn more | keywords |
            films | interesting facts | blog titles | arguments
        """,
        "ideas": "ideas | {n} ideas | some ideas | {n} creative ideas | fun ideas | {n} themes | low-cost ideas",
        "piece": """
            an essay | an article | a blog post | a report | a paragraph | a short essay | a summary | a short text |
            a speech outline | an introduction
        """,
        "story": """
            a {short} story about {topic} | a story about {topic} and {topic2} | a story about {person} and {topic} |
            a story about {topic} | a {short} story with {athing} and {person} | a fairy tale about {athing} |
            a {short} story set in {place} | a bedtime story about {topic}
        """,
        "trip": """
            a {few} day trip to | a trip to | a {few}-day holiday in | a weekend in | a {few} week tour of | a cheap holiday in |
            one day in
        """,
        "plan": """
            Make a plan to {activity} | Plan {event} | Make a {few} week plan to {activity} | Create a schedule for {event} |
            Make a checklist for {event} | Create a {few}-day plan to {activity} | Plan a {adj} {noun} | Organise {event}
        """,
        "naming": """
            Suggest a name | Suggest {n} names | Write a slogan | Come up with a name | Create a slogan | Come up with {n} names |
            Find a good name | Write a tagline
        """,
        "advert": """
            a product description for {athing} | an advertisement for {athing} | a tweet about {topic} | a caption about {topic} |
            an ad for {athing} | a review of {athing} | a social media post about {topic} | a press release about {topic}
        """,
        "quiz": """
            Make a quiz about {topic} | Write {n} quiz questions about {topic} | Create a lesson plan about {topic} |
            Make a worksheet about {topic} | Write {n} exam questions about {topic}
        """,
        "scene": """
            a dialogue between {person} and {person2} about {topic} | a conversation between {ajob} and {person} about {topic} |
            a scene with {person} and {person2} in {place} | a song about {topic} | a joke about {topic} | a play about {topic} |
            a rap about {topic} and {topic2}
        """,
        "role": "You are | Act as | Imagine you are | Act like | Pretend to be | I want you to act as",
        "ask": """
            Explain {topic}. | Tell me about {topic}. | Give me advice on {doing}. | Write a {short} story about {topic}. |
            How do I {activity}? | What do you think about {topic}? | Help me {activity}. | Answer my questions about {topic}. |
            Suggest {n} {things} about {topic}.
        """,
        "doing": """
            learning {language} | cooking {food} | playing the {noun} | taking care of {athing} | talking to {ajob} |
            travelling to {place} | buying {athing} | writing about {topic} | teaching {topic} | selling {plural} |
            designing {athing} | living in {place} | working as {ajob}
        """,
        "sides": """
            pros and cons | advantages | disadvantages | benefits | risks | advantages and disadvantages |
            strengths and weaknesses
        """,
        "sort": "Classify | Sort | Group | Rank | Order | Categorise | Arrange",
        "style": """
            in a formal style | in the past tense | in the passive voice | in simple words | for {audience} | in a friendly tone |
            as a question | in the style of {person} | in {many} words | more politely | as a poem | in the active voice
        """,
        "label": "positive | formal | a fact | spam | happy | true | fiction | safe | a question",
        "label2": "negative | informal | an opinion | useful | angry | false | non-fiction | dangerous | a statement",
        "textq": """
            What is the main idea? | Who is mentioned here? | Where does this take place? | When did this happen? |
            How many {plural} are there? | What happened to the {noun}? | What did {person} do? | Why is {place} important? |
            What is said about {topic}?
        """,
        "asktext": """
            What is the {texttrait} of this {textkind}? | What is the {texttrait} of this? | Who wrote this {textkind}? |
            Who would read this {textkind}? | Where might this {textkind} come from? | When was this {textkind} written? |
            Why would somebody write this {textkind}? | What should I answer to this {textkind}? |
            What does the writer want? | What is the reader of this supposed to do? | Which words of this are the most important? |
            How old is the writer of this {textkind}? | How can I make this {textkind} {textbetter}? |
            Make this {textkind} {textbetter}. | Make this {textbetter}. | Turn this into {textform}. |
            Turn this {textkind} into {textform}. |
            Write {textform} from this {textkind}. | Find the {textparts} in this {textkind}. | List the {textparts} in this. |
            Count the {textparts} in this {textkind}. | Underline the {textparts}. | Continue this {textkind}. |
            Write an answer to this {textkind}. | Does this {textkind} make sense? | Is this a good {textkind}? |
            Do you agree with this {textkind}? | Comment on this {textkind}. | Explain this {textkind} to {audience}. |
            Compare this {textkind} with {textform}. | Ask {n} questions about this {textkind}. | What is wrong with this {textkind}? |
            How would {person} say this? | How does this {textkind} end? | Would {person} like this {textkind}?
        """,
        "textkind": "text | message | letter | email | story | paragraph | post | passage | article | review | sentence | comment",
        "texttrait": "tone | topic | purpose | style | message | point | audience | mood | register | conclusion",
        "textbetter": "shorter | longer | clearer | more polite | funnier | more formal | easier to read | more exciting | less wordy",
        "textform": """
            a poem | a table | a dialogue | an email | a list of steps | a tweet | a question | a quiz | a short story | a timeline
        """,
        "textparts": "names | numbers | verbs | adjectives | places | dates | nouns | people | mistakes | facts | claims",
        "lang": "Python | Java | C | JavaScript | Rust | Go | Bash | SQL | PHP | Ruby | C++ | Kotlin | Swift | R",
        "codetask": """
            sort a list of {plural} | count the {plural} in a file | read a CSV file of {plural} |
            compute the average of {n} numbers | find the largest of {n} numbers | reverse a string |
            remove duplicates from a list of {plural} | check whether {n} is prime | print the first {n} prime numbers |
            download an image of {athing} | store {plural} in a database | draw {athing} | convert {n} dollars to euros |
            search for {word} in a text | simulate {athing} | rename {n} files
        """,
        "problem": """
            My {noun} is {adj} | I have lost my {noun} | My {relative} wants {athing} | I can't find {athing} in {place} |
            My {noun} makes a strange noise | I am moving to {place} in {month} | My {relative} is afraid of {plural} |
            I don't understand {topic} | I have to write about {topic} by {month} | My boss asked me about {topic} |
            I bought {athing} and it does not work | I have {n} {plural} and nowhere to put them |
            I want to {activity} but I am too busy | My {relative} and I argue about {topic} |
            I have only {n} dollars for {athing}
        """,
        "relative": "sister | brother | mother | father | son | daughter | neighbour | dog | cat | friend | cousin | husband | wife",
        "fact": """
            What is the {attribute} of {place} | Who invented the {noun} | When was {person} born | Where is {place} |
            Where is {pseudo} | How many {plural} are there in {place} | How old is {person} | Who wrote {work} |
            When did {person} move to {place} | What is {person} known for | Which {noun} is the best |
            What is the biggest {noun} in {place} | How much does {athing} cost | What colour is {athing} |
            How far is {place} from {place2} | Which {plural} are found in {place} | Who is the {job} in {work} |
            How long is {work} | What are the {n} most famous {plural} | What year was the {noun} invented |
            What kind of {noun} is {pseudo} | What happened in {place} in {year} | Who won the {noun} prize in {year} |
            Who discovered {topic} | How many {plural} can {ajob} carry | How much does a {noun} weigh |
            What do {plural} have to do with {topic} | Which is bigger, {athing} or {athing}
        """,
        "attribute": "capital | population | history | climate | best part | national dish | oldest building | flag | currency | area",
        "yesno": """
            Is {topic} dangerous | Is {topic} important | Should I buy {athing} | Does {place} have {athing} |
            Is {person} a good {job} | Do people in {place} like {food} | Can I use {athing} as {athing} |
            Is it true that {person} lived in {place} | Is {place} bigger than {place2} | Can {plural} be {adj} |
            Are {plural} better than {plural} | Did {person} know {person2} | Is it safe to {activity} |
            Do I need {athing} to {activity} | Is {number} bigger than {n} | Was {person} {a_job} |
            Is {topic} the same as {topic2} | Would {person} like {food} | Should {plural} be banned | Is it easy to {activity}
        """,
        "op": "plus | minus | times | divided by | + | - | * | / | percent of",
        "maths": """
            {name} has {n} {plural} and gives {n2} to {name2}. How many {plural} are left? |
            A {noun} costs {n} dollars and a {noun} costs {n2} dollars. How much do both cost together? |
            A train travels {n} km in {n2} hours. How fast is it? | {name} buys {n} {plural} for ${n2} each. What is the total? |
            If {n} {plural} weigh {n2} kg, how much does one weigh? |
            A {noun} is {n} cm long and {n2} cm wide. What is its area? |
            {name} reads {n} pages a day. How long does a book of {n2} pages take?
        """,
        "a": "{topic} | {athing} | {place} | {food} | {person}",
        "group": "words | things | items | names | examples | topics",
        "sentence": """
            The {adj} {noun} {past} the {noun} near {place}. | {person} {past} {athing} in {year}. |
            In {year}, {person} moved to {place} and opened {a_noun} for {audience}. |
            Our {noun} costs {n} dollars and the {noun} is {adj}. | The {plural} in {place} are {adj} and {adj}. |
            I think that {topic} is more important than {topic2}. | {name} said that the {noun} was {adj}. |
            There were {n} {plural} and only one {noun}. | Nobody {past} the {noun} at first. |
            The {job} {past} every {noun} before {month}. | My {relative} {past} the {adj} {noun} yesterday. |
            It was a {adj} day in {place}. | She {past} the {noun} and he {past} the {plural}. |
            {Plural} are often {adj}, but {plural} are {adj}. | Many people believe that {topic} began in {place}. |
            The {pseudo} {noun} has {n} {plural} and weighs {n2} kg. | He likes {food}, {food} and {food}. |
            The project about {topic} starts in {month} {year}. | We need {n} {plural} by {month}. |
            {pseudo} is {a_adj} {noun} from {place}. | This {noun} works well; the {noun} does not. |
            {person}, {a_job}, {past} {work}. | Why did the {job} {verb} the {noun}? |
            The {word} of the {noun} is {word}, {word} or {word}. | Dear {name}, I have the {noun} and the {plural}. |
            me and my {relative} was at the {noun} on {month} {day}
        """,
        "statement": """
            I like {topic} and {topic2} | I'm writing a book about {topic} | My {noun} is {adj} | I was reading about {topic} |
            {person} told me about {topic} | I live in {place} and I work as {ajob} | I have {n} {plural} |
            We are planning {event} | My {relative} is learning {language} | I am {a_job}
        """,
        "phrase": """
            {a_adj} {noun} | the {noun} of {person} | {topic} | {n} {plural} | the {adj} {plural} | {athing} | a {short} {noun} |
            {person} | the word {quoted} | {n} examples of {topic} | the main {plural} of {topic} | {adj} and {adj} {plural} |
            {pseudo} | {word}
        """,
        "relation": """
            for {phrase} | about {phrase} | in {place} | with {phrase} | that is {adj} | from {phrase} |
            between {phrase} and {phrase} | for {audience} | to {activity} | in {n} words | using {phrase} | without {phrase} |
            of {phrase} | in {year} | by {person} | based on {phrase} | into {phrase} | like {phrase} | as {phrase}
        """,
        "command": """
            {request} {phrase} | {request} {phrase} {relation} | {request} {phrase} {relation} |
            {request} {phrase} {relation} {relation} | {request} how {phrase} can {verb} {phrase} |
            {request} the {noun}: {phrase}, {phrase} and {phrase}
        """,
        "question": """
            What is {phrase} {relation} | Which {noun} {past} {phrase} | How can {phrase} {verb} {phrase} |
            What would happen if {phrase} {past} {phrase} | When did {phrase} {verb} {phrase} {relation} |
            Who {past} {phrase} {relation} | Where can I find {phrase} {relation} | Do you know {phrase} {relation} |
            What are {phrase} {relation} | Are there {plural} {relation} | How {adj} is {phrase} |
            How many {plural} does {phrase} have | If {phrase} is {adj}, what is {phrase} | Why should {phrase} {verb} {phrase} |
            Who should {verb} {phrase} {relation} | Which of these is {adj}: {phrase}, {phrase} or {phrase}
        """,
    }.items()
}
