"""Built-in texts: to measure drift on, and to choose 4-bit codes for."""

from __future__ import annotations

# Short prompts of several kinds, for measuring drift where no data is at hand.
DRIFT_PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Tom has 3 apples and buys 4 more. How many apples does he have now?",
    "Explain in one sentence why the sky is blue.",
    "def fibonacci(n):",
    "Translate to German: The weather is nice today.",
)
DRIFT_PASSAGES = (
    "Bread needs only flour, water, salt and time. The dough is mixed in the evening, left in a cool place over "
    "night and shaped in the morning. In the oven the water in it turns to steam and lifts the crumb, while the "
    "crust becomes brown and hard. A loaf that sounds hollow when you knock on its bottom is done.",
    "The committee met on 14 May in Lisbon. It approved the budget of 2.4 million euros for the coming year, of "
    "which a third goes to the repair of the harbour. Two members voted against it, because the school, they "
    "said, had waited longer. The next meeting takes place on 11 June.",
    "def count_words(text):\n    counts = {}\n    for word in text.lower().split():\n"
    '        word = word.strip(".,")\n        counts[word] = counts.get(word, 0) + 1\n    return counts\n',
)
# Of several kinds, for calibration where no data is at hand.
CALIBRATION_TEXTS = (
    "The old lighthouse had stood on the cliff for two hundred years. Every evening its keeper climbed the "
    "narrow stairs, lit the lamp and wrote the weather into a thick book. On clear nights he could count "
    "the fishing boats; in a storm he saw nothing but his own reflection in the glass.",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the air presses less, so it boils "
    "earlier: at 3,000 metres at about 90 degrees. That is why potatoes take longer to cook there, and why "
    "climbers carry pressure cookers.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return "
    "total / len(values)",
    "Dear Ms Keller, thank you for your letter of 3 March. We are sorry that the lamp arrived broken. A "
    "new one leaves our store tomorrow; please keep the old box, our driver will take it back. Yours "
    "sincerely, Tom Weber",
    "Question: A train leaves at 14:10 and arrives at 16:45. How long does the journey take? Answer: From "
    "14:10 to 16:10 are two hours, and 35 minutes remain, so it takes 2 hours and 35 minutes.",
    "Le marché ouvre à sept heures. On y trouve des pommes, du pain frais et du fromage de la région. Der "
    "Zug nach Hamburg fährt um neun Uhr von Gleis vier ab. El museo está cerrado los lunes.",
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"], "alive": false}',
    "Shopping list for Saturday: 2 loaves of bread, 500 g of butter, six eggs, a bottle of olive oil, "
    "three lemons. Write it as a table with the columns item, number and unit.",
    "Summarise in one sentence: The river rose two metres in the night. The bridge was closed at dawn, and "
    "the school on the other bank stayed empty. By noon the rain had stopped, and the first shops opened "
    "again.",
    "Is 91 a prime number? No: 91 = 7 x 13. The next prime after 89 is 97.",
)
