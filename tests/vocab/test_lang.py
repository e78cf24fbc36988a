import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmtp.vocab.lang import LANGUAGES, LOOK_AT, OTHER, detect, letters


@pytest.mark.parametrize(
    "text, lang",
    [
        ("The quick brown fox jumps over the lazy dog.", "en"),
        ("café, naïve, Straße", "en"),
        ("", "en"),
        ("42", "en"),
        ("π ≈ 3.14159 …", "el"),
        ("— “42” → 7 × 6", "en"),
        ("今天的天气很好，我们去公园散步吧。", "zh"),
        ("我觉得使用 Python 和 machine learning 的方法很好。", "zh"),
        ("使用 requests.get(url) 发送请求，然后用 json.loads 解析返回的内容即可得到结果。", "zh"),
        ("def add(a, b):\n    # 两数之和\n    return a + b\n\nprint(add(first_number, second_number))", "en"),
        ("The Chinese word for tea is 茶 (chá).", "en"),
        ("今日はとても天気がいいので、公園を散歩しましょう。", "ja"),
        ("東京大学で機械学習を研究しています。", "ja"),
        ("产品の说明：这个商标里有一个日文字，其余都是中文，所以应当算作中文。", "zh"),
        ("오늘은 날씨가 좋아서 공원을 산책했습니다.", "ko"),
        ("Сегодня хорошая погода.", "ru"),
        ("الطقس جميل اليوم", "ar"),
        ("आज मौसम अच्छा है", "hi"),
        ("วันนี้อากาศดี", "th"),
        ("Ο καιρός είναι καλός", "el"),
        ("מזג האוויר יפה", "he"),
        ("নদীর জল আজ শান্ত, আকাশ পরিষ্কার।", "other"),
        ("ტყეში ჩიტები მღერიან", "other"),
        ("Անտառում թռչունները երգում են", "other"),
        ("ወንዙ ዛሬ ጸጥ ብሏል", "other"),
        ("இன்று வானிலை நன்றாக உள்ளது", "other"),
        ("ဒီနေ့ ရာသီဥတု ကောင်းတယ်", "other"),
        ("ថ្ងៃនេះអាកាសធាតុល្អ", "other"),
        ("ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", "other"),
        ("𞤆𞤵𞤤𞤢𞤪 𞤬𞤵𞤤𞤬𞤵𞤤𞤣𞤫", "other"),
        ("ܫܠܡܐ ܥܠܝܟܘܢ", "other"),
        ("PDF: নদীর জল আজ শান্ত, আকাশ পরিষ্কার।", "other"),
        ("The river Padma (পদ্মা) is one of the longest in the country.", "en"),
        ("𝑥 + 𝑦 = 𝑧 for all 𝑥, 𝑦 ∈ ℝ", "en"),
        ("５０ ＡＢＣ", "en"),
        ("5 µm, 3 Ω, 20 °C, 1ª, x², ♥️, 👍🏽", "en"),
        ("Thời tiết hôm nay đẹp", "en"),
        ("ə ˈɹɪvɚ flows", "en"),
        ("ﺍﻟﻄﻘﺲ ﺟﻤﻴﻞ", "ar"),
    ],
)
def test_languages(text, lang):
    assert detect(text) == lang


def test_only_the_beginning_counts():
    assert detect("word " * LOOK_AT + "中文" * 10 * LOOK_AT) == "en"
    assert detect("中文" * LOOK_AT + "word " * 10 * LOOK_AT) == "zh"


@given(st.text())
def test_every_text_has_a_language(text):
    assert detect(text) in (*LANGUAGES, OTHER)
    assert detect("no letters of it: " * 9 + "👍🏽") == "en" and letters(text)[OTHER] >= 0


@given(st.text(alphabet="0123456789 .,+-=()\n", max_size=50))
def test_figures_do_not_change_the_language(figures):
    assert detect("这是一个句子" + figures) == "zh"
    assert detect("this is a sentence" + figures) == "en"
