"""Japanese chat messages, made of the beginnings and endings of sentences."""

import random
from collections.abc import Iterator

COMMON, RARE = "注文", "顕微鏡"

BEGINNINGS = (
    "注文した商品が",
    "先週の注文が",
    "注文番号{}が",
    "請求書{}が",
    "届いた荷物が",
    "新しいパスワードが",
    "アプリの画面が",
    "クーポン{}が",
    "返金の手続きが",
    "配送先の住所が",
    "領収書のメールが",
    "東京の店舗が",
    "ポイントの残高が",
    "会員登録が",
    "サポートの電話が",
    "昨日の予約が",
)
ENDINGS = (
    "まだ届きません。",
    "見つかりません。",
    "表示されなくなりました。",
    "使えないようです。",
    "間違っていると思います。",
    "壊れていました。交換してください。",
    "変更できるか教えてください。",
    "確認できました。ありがとうございます。",
    "遅れている理由を知りたいです。",
    "必要です。方法を教えてください。",
    "消えてしまいました。",
    "届いたら連絡してください。",
)


def messages() -> Iterator[str]:
    """An endless series of messages. Three of sixteen name a number."""
    generator = random.Random(5)  # noqa: S311 - the same data in every run
    while True:
        beginning = generator.choice(BEGINNINGS).format(generator.randrange(10_000, 100_000))
        yield beginning + generator.choice(ENDINGS)
